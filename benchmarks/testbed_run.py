"""Records what a real Slurm cluster does with three host jobs and two studies, for `hydro-sim validate`.

First a calibration on the same cluster: profiles of the study at several fusion counts, and the overheads of one small
study behind one host. Everything that the replay is given is fixed then, and put aside. Then the run itself: a cluster
of three nodes, of which the studies' jobs take one; two hosts run, the third one waits for a node. Each study uses the
bubbles of the hosts of its own team (own mode; the teams have homes of their own).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydro_slurm import formats
from hydro_slurm.errors import HydroError
from hydro_slurm.model import HOST_COMMENT, BundleSpec, TrialResult
from hydro_slurm.slurm import BatchRequest
from hydro_slurm.study.report import read_summary
from hydro_slurm.testbed import Testbed, TestbedSpec

T = TypeVar("T")

HOST_PROGRAM = Path(__file__).parent / "programs" / "testbed_host.py"
COMPUTE_MS, GAP_MS = 20.0, 80.0
MAX_LANES, STEPS = 4, 1200
CALIBRATION_TRIALS, CALIBRATION_STEPS = 8, 800
START_UP_S = 1.0
"""A host's five iterations of learning, which are part of the time until its slot is offered."""
POLL_S = 0.3
LIMIT_S = 400.0

STUDY_TEXT = """
import torch
from torch import nn
import hydro_trials as hydro

def build(width):
    hidden = round(32 * width)
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3))

def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = (x @ torch.randn(8, 3, generator=generator)).argmax(1)
    return hydro.Data(train=(x[:192], y[:192]), valid=(x[192:], y[192:]))

study = hydro.Study(
    name="NAME", build=build, data=data, loss=nn.functional.cross_entropy, optimizer="adam",
    space={"lr": hydro.Float(1e-4, 1e-2, log=True)}, batch_size=16, steps=STEPS, rungs=1, trials=TRIALS,
    max_lanes=LANES, width_scale=SCALE, seed=1, top_k=1, sampler="random", pruner="none",
)
"""


@dataclass(frozen=True, slots=True)
class HostPlan:
    """A host job that will be submitted."""

    name: str
    team: str
    submit_s: float
    iterations: int
    core: int


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """A study that will be submitted."""

    name: str
    team: str
    submit_s: float
    trials: int


HOSTS = (
    HostPlan("alpha", "one", 2.0, 200, 0),
    HostPlan("beta", "two", 3.0, 3000, 1),
    HostPlan("gamma", "one", 4.0, 3000, 0),
)
STUDIES = (StudyPlan("first", "one", 0.0, 20), StudyPlan("second", "two", 1.0, 24))


class Team:
    """A home on the shared file system, with the jobs of one team."""

    def __init__(self, testbed: Testbed, user: str, name: str) -> None:
        self.testbed, self.user = testbed, user
        self.home = testbed.shared_dir / f"team-{name}"
        self.client = testbed.client(user=user)
        self.environment = {
            "HOME": str(self.home),
            "HYDRO_HOME": str(self.home / "hydro"),
            "HYDRO_RUN": f"/dev/shm/hydro-run-{name}",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }
        self.run(["mkdir", "-p", str(self.home)])

    def run(self, argv: list[str], stdin: str = "") -> str:
        done = self.testbed.run(argv, user=self.user, env=self.environment, timeout_s=120, stdin=stdin)
        return done.stdout

    def write(self, name: str, text: str) -> Path:
        self.run(["sh", "-c", f"cat > {self.home / name}"], text)
        return self.home / name

    def study_file(self, name: str, trials: int, *, width_scale: float = 4.0, steps: int = STEPS) -> Path:
        words = {"NAME": name, "STEPS": steps, "TRIALS": trials, "LANES": MAX_LANES, "SCALE": width_scale}
        text = STUDY_TEXT
        for word, value in words.items():
            text = text.replace(word, str(value))
        return self.write(f"{name}.py", text)

    def profile(self, file: Path, lanes: list[int]) -> list[tuple[int, float]]:
        """Lane steps per second at several fusion counts, alone on a core; the median of three."""
        argv = [sys.executable, "-m", "hydro_trials", "profile", str(file), "--json", "--lanes", *map(str, lanes)]
        runs = [json.loads(self.run(["taskset", "-c", "0", *argv]))["points"] for _ in range(3)]
        return [(count, statistics.median(run[i]["lane_steps_per_s"] for run in runs)) for i, count in enumerate(lanes)]

    def submit_host(self, plan: HostPlan) -> int:
        argv = [sys.executable, str(HOST_PROGRAM), "--core", str(plan.core), "--iterations", str(plan.iterations)]
        argv += ["--compute-ms", str(COMPUTE_MS), "--gap-ms", str(GAP_MS)]
        return self.client.submit(
            BatchRequest(
                argv=["srun", *argv],
                name=plan.name,
                nodes=1,
                ntasks_per_node=1,
                cpus_per_task=2,
                mem_mib=4000,
                comment=HOST_COMMENT,
                output=self.home / f"{plan.name}.log",
                work_dir=self.home,
                env=self.environment,
                extra_options=["--exclude=n1"],
            )
        )

    def submit_study(self, file: Path) -> tuple[int, Path]:
        options = ["--json", f"--poll-s={POLL_S}", "--slurm-poll-s=1", "--own-allocation=never", "--mem=500M"]
        options += ["--cpus-per-task=1", "--nodelist=n1"]
        argv = [sys.executable, "-m", "hydro_slurm.cli.main", "study", "submit", str(file), *options]
        found = json.loads(self.run(argv))
        return found["job_id"], Path(found["directory"])


def wait_for(what: str, check: Callable[[], T | None]) -> T:
    """Poll until there is something."""
    deadline_s = time.monotonic() + LIMIT_S
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > deadline_s:
            raise HydroError(f"recording: gave up waiting for {what} after {LIMIT_S:.0f} s")
        time.sleep(0.5)


@dataclass(frozen=True, slots=True)
class BundleTimes:
    """What a bundle left behind."""

    spec: BundleSpec
    launched_s: float
    admitted_s: float
    last_result_s: float
    left_s: float
    num_admitted: int
    results: list[TrialResult]


def bundle_times(directory: Path) -> list[BundleTimes]:
    """Read the bundles of a study, in the order of their starts."""
    found = []
    for path in sorted(directory.glob("bundles/*/spec.json")):
        lines = (path.parent / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        results = [formats.read_record(TrialResult, each) for each in path.parent.glob("results/*.json")]
        admitted = [event["t_s"] for event in events if event["event"] == "admitted"]
        if not admitted or not results:
            continue
        found.append(
            BundleTimes(
                spec=formats.read_record(BundleSpec, path),
                launched_s=path.stat().st_mtime,
                admitted_s=min(admitted),
                last_result_s=max(result.written_at_s for result in results),
                left_s=max([event["t_s"] for event in events if event["event"] == "left"], default=0.0),
                num_admitted=len(admitted),
                results=results,
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class _Sample:
    """What one study of the calibration has shown; times in seconds."""

    learning_s: float
    iteration_ms: float
    lane_steps_per_s: float
    launch_s: float
    leave_s: float
    study_start_s: float
    study_end_s: float


def calibrate(testbed: Testbed, user: str) -> dict[str, Any]:
    """Everything that the replay is given beside submit times and descriptions, measured before the run.

    Profiles come from a core alone. The overheads come from two small studies, each behind a host on a core of its own,
    at the same time: so busy is the machine in the run, too.
    """
    teams = [Team(testbed, user, f"calibration-{core}") for core in range(2)]
    file = teams[0].study_file("profiled", CALIBRATION_TRIALS)
    curve = teams[0].profile(file, [1, 2, 3, 4])
    target = teams[0].profile(teams[0].study_file("target", CALIBRATION_TRIALS, width_scale=1.0), [1])
    with ThreadPoolExecutor(2) as pool:
        samples = list(pool.map(_calibrate_one, teams, range(2)))

    def mean(name: str) -> float:
        return statistics.fmean(getattr(sample, name) for sample in samples)

    usable = 2 * (GAP_MS - 2.5) / mean("iteration_ms")
    overheads: dict[str, Any] = {"poll_s": POLL_S, "refill_s": 0.0}
    overheads |= {name: round(mean(name), 3) for name in ("launch_s", "leave_s", "study_start_s", "study_end_s")}
    overheads["source"] = "measured on the same cluster in a calibration before the run"
    return {
        "curve": curve,
        "target_curve": target,
        "iteration_ms": round(mean("iteration_ms"), 3),
        "learning_s": round(mean("learning_s"), 3),
        "efficiency": round(min(mean("lane_steps_per_s") / (curve[-1][1] * usable), 1.0), 4),
        "overheads": overheads,
    }


def _calibrate_one(team: Team, core: int) -> _Sample:
    file = team.study_file("calibration", CALIBRATION_TRIALS, steps=CALIBRATION_STEPS)
    host = team.submit_host(HostPlan("calibration", "", 0.0, 5000, core))
    started_s = wait_for("the calibration's host", lambda: team.client.job(host).start_time_s)
    reports = team.home / "hydro" / "slots"

    def offered() -> float | None:
        for path in reports.glob("*.json") if reports.is_dir() else []:
            if json.loads(path.read_text())["bubble_s_per_s"] > 0:
                return time.time()
        return None

    offered_s = wait_for("the calibration's slot", offered)
    job, directory = team.submit_study(file)
    submit_s = time.time()
    wait_for("the calibration's study", lambda: read_summary(directory))
    end_s = wait_for("the end of its job", lambda: time.time() if team.client.job(job).ended else None)
    iteration_s = json.loads(next(reports.glob("*.json")).read_text())["iteration_s"]
    team.client.cancel(host)
    team.client.wait_job(host, timeout_s=60)
    search, verify = (
        next(b for b in bundle_times(directory) if b.spec.purpose == purpose) for purpose in ("search", "verify")
    )
    return _Sample(
        learning_s=max(offered_s - started_s, 0.0),
        iteration_ms=1e3 * iteration_s,
        lane_steps_per_s=CALIBRATION_TRIALS * CALIBRATION_STEPS / (search.last_result_s - search.admitted_s),
        launch_s=statistics.fmean(bundle.admitted_s - bundle.launched_s for bundle in (search, verify)),
        leave_s=max(search.left_s - search.last_result_s, 0.0),
        study_start_s=search.launched_s - submit_s,
        study_end_s=end_s - verify.last_result_s,
    )


def describe_before(calibration: dict[str, Any]) -> dict[str, Any]:
    """The scenario of the replay, made before the run; the submit times, which it is given too, come later."""
    learning_s, iteration_ms = calibration["learning_s"], calibration["iteration_ms"]
    start_up_h = max(learning_s - START_UP_S, 0.0) / 3600
    return {
        "name": "a run of the testbed",
        "partitions": [{"name": "hosts", "nodes": 2, "devices_per_node": 1}],
        "scheduler": {"policy": "fifo"},
        "bubbles": {
            "efficiency": calibration["efficiency"],
            "source": "gaps of the hosts' description, efficiency of the calibration",
        },
        "overheads": calibration["overheads"],
        "policy": {"mode": "own", "hosts": {"min_stages": 1, "min_age_s": 0.0}},
        "hosts": [
            {
                "name": plan.name,
                "user": plan.team,
                "devices": 1,
                "gaps_ms": [GAP_MS, GAP_MS],
                "iteration_ms": iteration_ms,
                "duration_h": plan.iterations * iteration_ms / 3.6e6 + start_up_h,
                "submit_h": plan.submit_s / 3600,
                "learning_s": learning_s,
                "slowdown_source": "assumed: the gate holds it near 0",
            }
            for plan in HOSTS
        ],
        "studies": [
            {
                "name": plan.name,
                "user": plan.team,
                "submit_h": plan.submit_s / 3600,
                "exclusive_devices": 0,
                "trials": plan.trials,
                "steps": STEPS,
                "curve": calibration["curve"],
                "max_lanes": MAX_LANES,
                "top_k": 1,
                "target_steps": STEPS,
                "target_curve": calibration["target_curve"],
            }
            for plan in STUDIES
        ],
    }


def record_run(output: Path) -> Path:
    """Record one run.

    Args:
        output: The recording's file.

    Raises:
        HydroError: The cluster does not start, or something takes too long.
    """
    with Testbed.up(TestbedSpec(nodes=3, cpus=2, memory_mib=8000), ephemeral=True) as testbed:
        user = testbed.ordinary_user()
        before = describe_before(calibrate(testbed, user))
        observed = _observe(testbed, user)
    for group in ("hosts", "studies"):
        for each in before[group]:
            each["submit_h"] = observed[group][each["name"]]["submit_s"] / 3600
    document = {
        "format": "hydro.testbed-run",
        "version": 1,
        "about": "Three light host jobs on two nodes and two studies in their bubbles, on a private Slurm cluster.",
        "before": before,
        "observed": observed,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")
    return output


def _observe(testbed: Testbed, user: str) -> dict[str, Any]:
    teams = {name: Team(testbed, user, name) for name in ("one", "two")}
    files = {plan.name: teams[plan.team].study_file(plan.name, plan.trials) for plan in STUDIES}
    zero_s = time.time() + 1.0
    submitted: dict[str, tuple[Team, int, float]] = {}
    directories: dict[str, Path] = {}
    for plan in sorted((*HOSTS, *STUDIES), key=lambda plan: plan.submit_s):
        time.sleep(max(zero_s + plan.submit_s - time.time(), 0.0))
        team = teams[plan.team]
        if isinstance(plan, HostPlan):
            job = team.submit_host(plan)
        else:
            # This checks the study's file first, which takes seconds: its job is submitted at the end of it.
            job, directories[plan.name] = team.submit_study(files[plan.name])
        submitted[plan.name] = (team, job, time.time())
    ends: dict[str, float] = {}

    def studies_ended() -> bool:
        for name, (team, job, _) in submitted.items():
            if name not in ends and team.client.job(job).ended:
                ends[name] = time.time()
        return directories.keys() <= ends.keys()

    wait_for("the studies to end", studies_ended)
    hosts, studies = {}, {}
    trials = dict.fromkeys((plan.name for plan in HOSTS), 0)
    host_of = {submitted[plan.name][1]: plan.name for plan in HOSTS}
    for name, (team, job, moment_s) in submitted.items():
        found = team.client.job(job)
        if found.ended and found.state != "COMPLETED":
            raise HydroError(f"recording: job {job} ({name}) is {found.state}, needed COMPLETED")
        # Hosts that outlive the studies are ended with the cluster: their ends are not observed.
        times = {"submit_s": moment_s - zero_s, "end_s": ends[name] - zero_s if name in ends else None}
        if name in directories:
            bundles = bundle_times(directories[name])
            studies[name] = {**times, "start_s": min(b.launched_s for b in bundles) - zero_s}
            for bundle in bundles:
                trials[host_of[bundle.spec.slot.job_id]] += bundle.num_admitted
        else:
            hosts[name] = {**times, "start_s": (found.start_time_s or 0.0) - zero_s}
    return {"hosts": hosts, "studies": studies, "trials_per_host": trials}
