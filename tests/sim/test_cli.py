"""The commands: what they print and write, and how they fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hydro_sim.cli import main
from hydro_sim.scenario import ScenarioFile
from hydro_sim.variants import parse_setting, points_of_sweeps
from hydro_slurm.errors import ConfigError

Write = Callable[..., ScenarioFile]
SCENARIOS = Path(__file__).resolve().parents[2] / "sim" / "scenarios"
RECORDING = Path(__file__).parent / "recordings" / "testbed_run.json"

TINY = """
name = "tiny"
partitions = [{ nodes = 5 }]
[bubbles]
throughput_share = 0.2
[[hosts]]
duration_h = 10.0
[[studies]]
trials = 40
steps = 1000
curve = [[1, 1.0], [16, 4.0]]
[variants.slow]
"bubbles.throughput_share" = 0.1
[sweeps.share]
"bubbles.throughput_share" = [0.1, 0.2, 0.4]
"studies.0.max_lanes" = [4, 16]
"""

SACCT = "JobID|JobName|User|Partition|State|Submit|Start|End|ElapsedRaw|Timelimit|AllocTRES\n"


def sacct_text(num_jobs: int = 60) -> str:
    rows = []
    for job in range(num_jobs):
        hours, gpus = (20, 16) if job % 10 == 0 else (1, 2)
        submit = f"2026-01-{1 + job // 20:02d}T{job % 20:02d}:00:00"
        start = f"2026-01-{1 + job // 20:02d}T{job % 20:02d}:05:00"
        day, hour = divmod(job % 20 + hours, 24)
        end = f"2026-01-{1 + job // 20 + day:02d}T{hour:02d}:05:00"
        rows.append(
            f"{job}|train|u{job % 3}|gpu|COMPLETED|{submit}|{start}|{end}|{hours * 3600}|2-00:00:00|gres/gpu={gpus}\n"
        )
    return SACCT + "".join(rows) + "99|x|u|gpu|COMPLETED|today|a|b|3|1:00:00|gres/gpu=2\n"


def test_run_writes_results_that_report_shows(
    scenario_file: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = scenario_file(TINY).path, tmp_path / "out"
    assert main(["run", str(path), "--output", str(output), "--set", "studies.0.trials=20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["studies_ended"] == 1
    assert main(["report", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["report", str(output)]) == 0
    assert "makespan h" in capsys.readouterr().out


def test_compare_and_sweep_run_side_by_side(
    scenario_file: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scenario_file(TINY).path
    assert main(["compare", str(path), "--output", str(tmp_path / "c"), "--processes", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["variants"]
    assert [row["variant"] for row in rows] == ["scenario", "slow"]
    assert rows[0]["reduction"] > rows[1]["reduction"] > 1
    assert main(["sweep", str(path), "--output", str(tmp_path / "s"), "--processes", "2"]) == 0
    assert capsys.readouterr().out.count("times shorter") == 6
    one, two = tmp_path / "s", tmp_path / "s1"
    assert main(["sweep", str(path), "--output", str(two), "--processes", "1"]) == 0
    for name in ("variants.csv", "summaries.json", "report.html"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), "processes have no say"
    assert "Sensitivity: share" in (one / "report.html").read_text()


def test_import_makes_a_scenario_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = tmp_path / "history.txt"
    history.write_text(sacct_text())
    folder = tmp_path / "mine"
    assert main(["import", str(history), "--output", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "malformed: 1 rows" in said
    assert "line 62: Submit: got 'today'" in said
    assert "jobs that could be hosts (from 16 devices and 6 h on): 6" in said
    assert "a guess: jobs held up to" in said
    changed = ["--set", "studies.0.trials=4", "--set", "studies.0.steps=500"]
    assert main(["run", str(folder / "scenario.toml"), "--output", str(tmp_path / "r"), "--json", *changed]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base_jobs"] == 54
    assert found["base_recorded_queueing_delay_h"]["mean"] == pytest.approx(5 / 60, abs=1e-3)
    assert found["studies_ended"] == found["studies"] == 3
    assert main(["import", str(history), "--output", str(folder)]) == 1
    assert "exists; choose another --output" in capsys.readouterr().err


def test_what_a_user_can_mend_is_one_line(
    scenario_file: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(scenario_file(TINY).path)
    for argv, fragment in (
        (["run", str(tmp_path / "none.toml")], "cannot read the scenario"),
        (["run", path, "--set", "studies.0.trails=3"], "there is no setting 'trails'"),
        (["run", path, "--set", "seed=1,2"], "`run` takes one value"),
        (["report", str(tmp_path)], "holds no results"),
        (["validate", str(tmp_path / "none.json")], "cannot read the recording"),
        (["sweep", path, "--set", "hosts.3.devices=1,2"], "is no place in a list"),
    ):
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert fragment in error


def test_settings_on_the_command_line_are_values() -> None:
    assert parse_setting("a.b=1,2.5,true,x") == ("a.b", [1, 2.5, True, "x"])
    with pytest.raises(ConfigError, match="needed NAME=VALUE"):
        parse_setting("nothing")


def test_the_scenario_of_the_paper_runs_and_states_what_it_assumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydro_sim.scenario import read_scenario

    file = read_scenario(SCENARIOS / "hydro_osdi23.toml")
    scenario = file.scenario()
    assert {name.split()[0] for name in scenario.variants} >= {"1", "2", "3"}, "the ablation"
    assert set(points_of_sweeps(file)) == {"share", "trials", "microbatches", "schedule"}
    assert sum(text.startswith("Assumed") for text in scenario.assumptions) >= 4
    output = tmp_path / "out"
    assert main(["run", str(file.path), "--output", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["studies_ended"] == 1
    assert "Assumed: no pruning" in (output / "report.html").read_text()


def test_every_scenario_that_comes_with_the_project_is_sound() -> None:
    from hydro_sim.scenario import read_scenario

    paths = sorted(SCENARIOS.glob("*.toml"))
    assert [path.name for path in paths] == ["hydro_osdi23.toml", "overlay.toml"]
    for path in paths:
        file = read_scenario(path)
        for changes in file.scenario().variants.values():
            file.scenario(changes)


def test_the_bare_rates_are_reached_with_many_trials(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With equal bundles everywhere and no end effect, 32 slots at 15 % give 1 + 32 * 0.15."""
    from hydro_sim.variants import Point, run_point

    changes = (("studies.0.max_lanes", 16), ("studies.0.trials", 20000))
    found = run_point(SCENARIOS / "hydro_osdi23.toml", Point("many", changes))
    assert 5.6 < found["reduction"] <= 5.8


def test_a_recorded_run_is_replayed_from_what_was_known_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(RECORDING), "--output", str(tmp_path / "v"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hosts"] >= 3
    assert found["studies"] >= 2
    assert abs(found["makespan_error"]) < 0.1
    # What happened has no way into the replay: another outcome leaves its predictions as they are.
    document = json.loads(RECORDING.read_text())
    for times in document["observed"]["studies"].values():
        times["end_s"] += 1000.0
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    assert main(["validate", str(other), "--output", str(tmp_path / "w"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_makespan_s"] == found["predicted_makespan_s"]
