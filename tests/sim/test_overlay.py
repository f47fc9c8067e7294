"""Hosts, bundles and studies: nothing is lost, no slot is used twice, equal runs are equal to the byte."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from hydro_sim import metrics
from hydro_sim.host_jobs import is_host
from hydro_sim.results import write_results
from hydro_sim.scenario import ScenarioFile, read_scenario
from hydro_sim.settings import HostConfig
from hydro_sim.simulation import Simulation, build
from hydro_sim.traces import TraceJob
from hydro_sim.variants import Point, run_points
from hydro_slurm.errors import ConfigError, TraceError
from hydro_slurm.model import COMPLETE, PRUNED
from hydro_slurm.policy import MovePolicy

Write = Callable[..., ScenarioFile]

ONE = """
name = "one"
partitions = [{ nodes = 5, devices_per_node = 8 }]
[bubbles]
throughput_share = 0.25
[overheads]
poll_s = 1.0
launch_s = 0.0
refill_s = 0.0
study_start_s = 0.0
leave_s = 0.0
[[hosts]]
devices = 4
duration_h = 10.0
learning_s = 0.0
[[studies]]
trials = 4
steps = 1000
curve = [[1, 1.0]]
max_lanes = 1
exclusive_devices = 0
"""


def run(file: ScenarioFile, **changes: object) -> Simulation:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    simulation = build(file.scenario(named), file.folder)
    simulation.run()
    return simulation


def check_world(simulation: Simulation) -> None:
    by_slot = defaultdict(list)
    for record in simulation.overlay.running.records:
        by_slot[record.slot].append((record.start_s, record.end_s))
    for spans in by_slot.values():
        ordered = sorted(spans)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ordered)), "two on a slot"
    for study in simulation.studies:
        assert study.end_s >= 0
        assert all(trial.state in (COMPLETE, PRUNED) for trial in study.trials)
        assert study.num_ended == len(study.trials)
        work = sum(trial.steps for trial in study.trials)
        work += sum(trial.steps for trial in study.verified.values())
        assert study.lane_steps >= work * (1 - 1e-6), "every step was computed by some bundle"
    held = sum(partition.device_s_until(simulation.engine.now_s) for partition in simulation.engine.partitions)
    rows = metrics.user_rows(simulation)
    assert sum(row["device_h"] for row in rows) == pytest.approx(held / 3600, rel=1e-4)


def test_a_study_in_bubbles_takes_what_the_shares_say(scenario_file: Write) -> None:
    simulation = run(scenario_file(ONE), policy__hosts={"min_age_s": 0.0})
    (study,) = simulation.studies
    assert study.end_s == pytest.approx(4000.0), "four trials of 1000 steps at a quarter of a step per second"
    assert len(simulation.overlay.running.records) == 4
    assert study.bubble_device_s == pytest.approx(4 * 1000.0)
    check_world(simulation)


def test_trials_run_in_waves_when_slots_are_fewer(scenario_file: Write) -> None:
    simulation = run(scenario_file(ONE), policy__hosts={"min_age_s": 0.0}, hosts__0__devices=8, studies__0__trials=12)
    assert simulation.studies[0].end_s == pytest.approx(8000.0, abs=2.0)
    check_world(simulation)


def test_everything_ends_once_and_devices_are_conserved(scenario_file: Write) -> None:
    simulation = run(scenario_file())
    check_world(simulation)
    for study in simulation.studies:
        assert len(study.verified) == min(2, sum(trial.state == COMPLETE for trial in study.trials)) > 0
    own = {record.slot for record in simulation.overlay.running.records if record.purpose == "verify"}
    assert own, "promoted trials run"
    assert all(".own." in slot for slot in own), "and they do on exclusive devices"
    assert any(record.host for record in simulation.overlay.running.records), "early rungs run in bubbles"


def test_bubbles_shorten_studies_and_take_nothing_from_the_base_load(scenario_file: Write) -> None:
    file = scenario_file()
    # Without pruning, whose outcome depends on which trial is evaluated first, the same work is to be done.
    changes = {"studies__0__eta": 0, "studies__0__trials": 60, "hosts__0__duration_h": 60.0}
    with_bubbles, without = run(file, **changes), run(file, **changes, bubbles__enabled=False)
    check_world(without)
    first, second = metrics.summary(with_bubbles), metrics.summary(without)
    assert first["makespan_h"] < second["makespan_h"]
    assert second["harvested_device_h"] == 0
    (partition,) = metrics.partition_rows(with_bubbles)
    assert partition["computing_before"] < partition["computing_after"] <= partition["allocated"]


def test_failures_lose_work_but_no_trial(scenario_file: Write) -> None:
    simulation = run(scenario_file(), failures={"node_mtbf_h": 30.0, "repair_h": 1.0, "host_mtbf_h": 10.0})
    assert simulation.failures.num_node_failures > 0
    assert simulation.failures.num_host_failures > 0
    check_failed = [host for host in simulation.hosts if host.num_failures]
    assert check_failed
    assert all(host.end_s >= 0 for host in simulation.hosts), "hosts are requeued and end"
    for host in check_failed:
        assert host.run_s >= host.duration_s - 1e-6
    for study in simulation.studies:
        assert study.num_ended == len(study.trials)
        assert study.done


def test_a_slowdown_of_hosts_is_paid_by_hosts(scenario_file: Write) -> None:
    plain, slowed = run(scenario_file(ONE)), run(scenario_file(ONE), hosts__0__slowdown=0.02)
    assert slowed.hosts[0].run_s == pytest.approx(1.02 * plain.hosts[0].run_s)


def test_memory_limits_the_lanes(scenario_file: Write) -> None:
    changes = {"studies__0__max_lanes": 16, "studies__0__curve": [[1, 1.0], [16, 16.0]], "studies__0__trials": 64}
    roomy = run(scenario_file(ONE), **changes)
    tight = run(scenario_file(ONE), **changes, studies__0__lane_mib=1024.0, hosts__0__free_gib=[5.0, 5.0, 5.0, 0.5])
    assert max(record.num_lanes for record in roomy.overlay.running.records) == 16
    assert max(record.num_lanes for record in tight.overlay.running.records) == 4
    assert {record.slot.split(".")[1] for record in tight.overlay.running.records} == {"0", "1", "2"}, (
        "no lane fits stage 3"
    )


def test_device_types_go_to_the_studies_that_gain_from_them(scenario_file: Write) -> None:
    pytest.importorskip("scipy", reason="shares over several device types need SciPy's solver")
    text = ONE.replace(
        "partitions = [{ nodes = 5, devices_per_node = 8 }]",
        'partitions = [{ name = "old", device_type = "old" }, { name = "new", device_type = "new" }]',
    )
    text += """
[[studies]]
name = "gains"
user = "other"
trials = 4
steps = 1000
curve = [[1, 1.0]]
max_lanes = 1
exclusive_devices = 0
relative_speed = { new = 5.0 }
[[hosts]]
name = "second"
partition = "new"
devices = 4
duration_h = 10.0
learning_s = 0.0
"""
    simulation = run(scenario_file(text), policy__hosts={"min_age_s": 0.0})
    by_study = {
        study.id: {record.host for record in simulation.overlay.running.records if record.study == study.id}
        for study in simulation.studies
    }
    assert by_study == {"study": {"host"}, "gains": {"second"}}
    assert [study.end_s for study in simulation.studies] == pytest.approx([4000.0, 800.0], abs=2.0)


def test_eager_transfer_is_off_unless_asked_for(scenario_file: Write) -> None:
    file = scenario_file()
    eager = run(file, policy__eager_transfer=True)
    check_world(eager)
    starts = [record.start_s for record in eager.overlay.running.records if record.purpose == "verify"]
    plain = [record.start_s for record in run(file).overlay.running.records if record.purpose == "verify"]
    assert min(starts) <= min(plain)


def test_the_policy_of_the_daemon_decides(scenario_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydro_slurm.policy import incremental, placement

    assert incremental.place is placement.place
    calls = []
    original = incremental.place

    def spy(*arguments: object) -> object:
        calls.append(arguments)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(incremental, "place", spy)
    simulation = run(scenario_file(ONE))
    assert len(calls) == simulation.overlay.decider.num_decisions > 0
    assert isinstance(simulation.scenario.policy.moves, MovePolicy)


def test_equal_runs_write_equal_bytes_and_other_seeds_do_not(scenario_file: Write, tmp_path: Path) -> None:
    file = scenario_file()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_results(run(file, seed=seed), tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "bundles.csv",
        "hosts.csv",
        "jobs.csv",
        "partitions.csv",
        "report.html",
        "studies.csv",
        "summary.json",
        "users.csv",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "bundles.csv").read_bytes() != (tmp_path / "c" / "bundles.csv").read_bytes()
    report = (tmp_path / "a" / "report.html").read_text()
    assert "synthetic" in report
    assert "<svg" in report
    assert "http" not in report, "the report needs nothing from elsewhere"


def test_ctrl_c_keeps_what_is_done(scenario_file: Write, tmp_path: Path) -> None:
    file = scenario_file()
    simulation = build(file.scenario(), file.folder)

    def interrupt() -> None:
        raise KeyboardInterrupt

    simulation.engine.call_at(3 * 3600.0, interrupt)
    simulation.run()
    assert simulation.interrupted
    found = write_results(simulation, tmp_path / "out")
    assert found["interrupted"]
    assert found["simulated_h"] == 3.0
    assert found["bundles"] > 0


def test_large_jobs_of_a_trace_can_be_the_hosts(scenario_file: Write) -> None:
    file = scenario_file()
    changes = {"from_trace_devices": 8, "from_trace_hours": 0.5}
    simulation = run(file, **{f"hosts__0__{name}": value for name, value in changes.items()})
    num_trace = len(simulation.base_jobs) + len(simulation.hosts) + simulation.too_large
    assert simulation.hosts
    assert num_trace == 300
    assert all(host.devices >= 8 and host.duration_s >= 1800 for host in simulation.hosts)
    check_world(simulation)


def test_a_job_that_has_offered_its_bubbles_is_a_host_whatever_its_size() -> None:
    config = HostConfig(from_trace_devices=16, from_trace_hours=6.0)
    assert not is_host(TraceJob(0.0, 60.0, 4), config)
    assert is_host(TraceJob(0.0, 60.0, 4, comment="v1 hydro:share"), config)
    assert is_host(TraceJob(0.0, 7 * 3600.0, 16), config)
    assert not is_host(TraceJob(0.0, 7 * 3600.0, 18), config), "18 devices make no 4 stages"


def test_what_a_scenario_gets_wrong_is_said_in_one_line(scenario_file: Write) -> None:
    with pytest.raises(ConfigError, match=r"there is no setting 'trails'; known: name, count"):
        scenario_file("[[studies]]\ntrails = 4\n")
    with pytest.raises(ConfigError, match=r"studies\[0\]: study 'study': rungs must rise to 1"):
        scenario_file("[[studies]]\nrungs = [0.5]\n")
    with pytest.raises(ConfigError, match="seed: got 'one', needed int"):
        scenario_file('seed = "one"\n')
    with pytest.raises(ConfigError, match="not TOML"):
        scenario_file("seed = \n")
    with pytest.raises(ConfigError, match="'7' is no place in a list of 1"):
        scenario_file(ONE).scenario({"hosts.7.devices": 3})
    file = scenario_file('[trace]\nformat = "philly"\nfile = "nowhere.csv"\n')
    with pytest.raises(TraceError, match=r"no trace is called nowhere\.csv in .*; set TRACES"):
        build(file.scenario(), file.folder)


def test_a_sweep_keeps_no_part_of_a_run_and_ends_when_it_is_interrupted(
    scenario_file: Callable[..., ScenarioFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [0]
    whole = Simulation.run

    def run_some(simulation: Simulation) -> None:
        runs[0] += 1
        whole(simulation)
        simulation.interrupted = runs[0] == 3  # the second point's first run

    monkeypatch.setattr(Simulation, "run", run_some)
    points = [Point(str(seed), (("seed", seed),)) for seed in range(3)]
    assert list(run_points(scenario_file().path, points, 1, lambda done, total: None)) == [0]
    assert runs == [3]


@pytest.mark.parametrize("group", ["hosts", "studies"])
def test_two_groups_of_one_name_are_refused(scenario_file: Callable[..., ScenarioFile], group: str) -> None:
    path = scenario_file().path
    path.write_text(path.read_text().replace("[trace]", f'[[{group}]]\nname = "{NAMES[group]}"\n\n[trace]'))
    with pytest.raises(ConfigError, match=f"{group} of the same name"):
        read_scenario(path).scenario()


NAMES = {"hosts": "gpt", "studies": "tune"}
