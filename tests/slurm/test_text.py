"""Reading what Slurm prints."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydro_slurm.errors import FormatError, SlurmError
from hydro_slurm.slurm.environment import scrubbed_environment
from hydro_slurm.slurm.text import Layout, format_duration, integers, parse_duration, parse_exit_code, parse_time


@given(st.lists(st.lists(st.text(max_size=20), min_size=3, max_size=3), max_size=5))
def test_any_text_survives_a_layout(records: list[list[str]]) -> None:
    layout = Layout(["%1", "%2", "%3"])
    start, first, second, end = re.split("%[123]", layout.text)
    printed = "".join(f"{start}{a}{first}{b}{second}{c}{end}\n" for a, b, c in records)
    assert layout.records(printed) == records


def test_two_layouts_never_share_their_separators() -> None:
    hostile = Layout(["%i", "%k"]).text.replace("%i", "666").replace("%k", "forged")
    layout = Layout(["%i", "%k"])
    output = layout.text.replace("%i", "1").replace("%k", hostile) + "\n"
    assert layout.records(output) == [["1", hostile]]


@pytest.mark.parametrize("output", ["garbage\n", "1 2 3"])
def test_refuses_what_has_another_layout(output: str) -> None:
    with pytest.raises(SlurmError, match="unexpected"):
        Layout(["%i", "%j"]).records(output)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:30", 30),
        ("30:00", 1800),
        ("45", 2700),
        ("1:00:00", 3600),
        ("2-03:04:05", 183845),
        ("1-12", 129600),
        ("365-00:00:00", 31536000),
        ("UNLIMITED", None),
        ("infinite", None),
        ("NOT_SET", None),
    ],
)
def test_reads_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "1:2:3:4", "-5", "1--2", "²", "1:x"])
def test_refuses_durations(text: str) -> None:
    with pytest.raises(FormatError, match="duration"):
        parse_duration(text)


@given(st.integers(1, 400 * 86400))
def test_a_written_duration_reads_back(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


def test_reads_times(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_time("1795287920") == 1795287920.0
    assert parse_time("N/A") is None
    assert parse_time("Unknown") is None
    written = parse_time("2026-11-21T19:05:20")
    assert written is not None
    assert parse_time("2026-11-21T19:06:20") == written + 60
    with pytest.raises(FormatError, match="time"):
        parse_time("yesterday")


@pytest.mark.parametrize(
    ("text", "code"), [("0", 0), ("768", 3), ("9", 137), ("0:0", 0), ("3:0", 3), ("0:15", 143), ("?", None), ("", None)]
)
def test_reads_exit_codes(text: str, code: int | None) -> None:
    assert parse_exit_code(text) == code


def test_refuses_words_for_numbers() -> None:
    with pytest.raises(SlurmError, match="number"):
        integers(["12", "many"])


def test_a_surrounding_job_is_scrubbed_from_the_environment() -> None:
    inside = {
        "PATH": "/bin",
        "SLURM_CONF": "/conf",
        "SLURM_JOB_ID": "7",
        "SBATCH_PARTITION": "x",
        "SRUN_DEBUG": "3",
        "SQUEUE_FORMAT": "%i",
        "SINFO_FORMAT": "%N",
        "HYDRO_HOME": "/h",
    }
    assert scrubbed_environment(inside) == {"PATH": "/bin", "SLURM_CONF": "/conf", "HYDRO_HOME": "/h"}
