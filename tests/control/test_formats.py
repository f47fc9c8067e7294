"""Files are read as strictly as something that another user may have written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydro_slurm import formats, model
from hydro_slurm.errors import FormatError

REPORT = model.SlotReport(
    node="n1",
    job_id=7,
    local_rank=0,
    global_rank=1,
    pid=42,
    gate_dir="/dev/shm/x",
    device=model.Device(kind="cpu", index=0, cpus=(1,)),
    stage=1,
    num_stages=2,
    iteration=10,
    iteration_s=0.4,
    bubble_s_per_s=0.2,
    gap_quantiles_ms={"p50": 60.0},
    free_bytes=1 << 30,
    guard=model.GuardReport(slowdown=0.001, slowdown_ci95=(-0.01, 0.02)),
    written_at_s=1.5,
)

SPEC = model.BundleSpec(
    bundle="b001",
    study="s",
    study_dir="/s",
    study_file="/s.py",
    purpose="search",
    width_scale=4.0,
    max_lanes=2,
    lanes=(model.LaneSpec(0, {"lr": 0.1}, 5), model.LaneSpec(1, {"lr": 0.2, "kind": "a"}, 6, "/c.pt")),
    rungs=(10, 20),
    slot=model.BundleSlot("bubble", "n1", model.Device(), "/dev/shm/x", 7, 0),
)


@pytest.mark.parametrize("record", [REPORT, SPEC])
def test_what_is_written_is_read_back(tmp_path: Path, record: object) -> None:
    formats.write_record(tmp_path / "r.json", record)
    assert formats.read_record(type(record), tmp_path / "r.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_not_a_number_becomes_null(tmp_path: Path) -> None:
    result = model.TrialResult(0, 0, 1, model.DIVERGED, float("nan"), {"loss": float("inf")}, "b", 0.1, 0.2)
    formats.write_record(tmp_path / "r.json", result)
    back = formats.read_record(model.TrialResult, tmp_path / "r.json")
    assert back.value is None
    assert back.metrics == {"loss": None}


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    document = {**formats.to_document(REPORT), "later": [1, 2]}
    assert formats.from_document(model.SlotReport, json.loads(json.dumps(document)), "x") == REPORT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "got format 'hydro.slot' version 2, needed 'hydro.slot' version 1"),
        ({"format": "other"}, "got format 'other'"),
        ({"job_id": "7"}, "job_id: got str, needed int"),
        ({"job_id": True}, "job_id: got bool, needed int"),
        ({"device": 3}, "device: got int, needed an object"),
        ({"device": {"cpus": 3}}, "device: cpus: got int, needed a list"),
        ({"gap_quantiles_ms": [1]}, "needed an object"),
        ({"node": None}, "node: got NoneType, needed str"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    document = {**json.loads(json.dumps(formats.to_document(REPORT))), **change}
    with pytest.raises(FormatError) as caught:
        formats.from_document(model.SlotReport, document, "slot.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named() -> None:
    document = formats.to_document(REPORT)
    del document["pid"]
    with pytest.raises(FormatError, match="field 'pid' is missing"):
        formats.from_document(model.SlotReport, document, "x")


def test_a_huge_file_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(b" " * (formats.MAX_FILE_BYTES + 1))
    with pytest.raises(FormatError, match="more than"):
        formats.read_record(model.SlotReport, path)


@given(data=st.binary(max_size=200))
def test_noise_is_refused_and_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "r.json"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        formats.read_record(model.SlotReport, path)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("[" * 100_000)
    with pytest.raises(FormatError):
        formats.read_record(model.SlotReport, path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    formats.write_record(path, REPORT)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        formats.write_record(path, dataclasses.replace(SPEC, lanes=(model.LaneSpec(0, {"lr": object()}, 1),)))
    with pytest.raises(UnicodeEncodeError):
        formats.write_text_atomic(path, "\udc80")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]
