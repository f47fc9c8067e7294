"""One demo from an empty machine to the proof: cluster up, host job, study, measurement, cluster down."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydro_slurm.demo.cluster import NUM_STAGES, DemoCluster, Evidence
from hydro_slurm.demo.summary import make_summary, table
from hydro_slurm.errors import HydroError
from hydro_slurm.testbed import Testbed, TestbedSpec

T = TypeVar("T")

POLL_S = 3.0
"""Seconds between two looks: the demo itself must not disturb what it measures."""

ARMS = "alone+bubbles," * 2 + "colocated:4,exclusive"
"""One round of measured blocks, in random order; what is compared most closely comes side by side, and most often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """What a demo may be told."""

    output: Path
    num_nodes: int = 4
    num_trials: int = 112
    block_iterations: int = 5
    exclusive_s: float = 1.0
    limit_s: float = 900.0
    """The whole demo is given up after this."""
    seed: int = 0


class Progress:
    """One line that is rewritten on a terminal; a new line now and then elsewhere."""

    def __init__(self, every_s: float = 10.0) -> None:
        self._started_s = self._printed_s = time.monotonic()
        self._live = sys.stdout.isatty()
        self._every_s = every_s

    def say(self, text: str) -> None:
        """A line that stays."""
        print(f"{self._erase()}[{self._age_s():5.0f} s] {text}", flush=True)

    def show(self, text: str) -> None:
        """The present state."""
        line = f"[{self._age_s():5.0f} s] {text}"
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"{self._erase()}{line[:width]}", end="", flush=True)
        elif time.monotonic() - self._printed_s >= self._every_s:
            self._printed_s = time.monotonic()
            print(line, flush=True)

    def _age_s(self) -> float:
        return time.monotonic() - self._started_s

    def _erase(self) -> str:
        return "\r\x1b[K" if self._live else ""


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo and write `summary.json` into `settings.output`.

    Returns:
        The summary.

    Raises:
        HydroError: A part did not start, failed or took too long; the cluster is down by then.
    """
    shutil.rmtree(settings.output, ignore_errors=True)
    settings.output.mkdir(parents=True)
    progress = Progress()
    deadline_s = time.monotonic() + settings.limit_s
    progress.say(f"starting a private Slurm cluster with {settings.num_nodes} nodes on this machine")
    spec = TestbedSpec(nodes=settings.num_nodes, cpus=2, memory_mib=16000)
    with Testbed.up(spec, ephemeral=True) as testbed:
        cluster = DemoCluster(testbed, testbed.ordinary_user())
        progress.say(f"Slurm {cluster.client.version()} is up; jobs are submitted by user {cluster.user}")
        run = _Run(settings, cluster, progress, deadline_s)
        try:
            return run.run()
        finally:
            run.keep_records()


class _Run:
    def __init__(self, settings: DemoSettings, cluster: DemoCluster, progress: Progress, deadline_s: float) -> None:
        self.settings, self.cluster, self.progress, self.deadline_s = settings, cluster, progress, deadline_s
        self.evidence = Evidence()
        self.host_job_id = self.study_job_id = 0

    def run(self) -> dict[str, Any]:
        settings, cluster = self.settings, self.cluster
        self.host_job_id = cluster.submit_host(
            f"--arms={ARMS} --seed={settings.seed} "
            f"--block-iterations={settings.block_iterations} --exclusive-s={settings.exclusive_s} "
            "--report-every-s=2 --max-slowdown=0.02 --iterations=1000000".split()
        )
        self.progress.say(f"host job {self.host_job_id} submitted: a character-level GPT in 2 pipeline stages, 1F1B")
        self.study_job_id = cluster.submit_study(settings.num_trials)
        self.progress.say(
            f"study job {self.study_job_id} submitted: {settings.num_trials} trials on scikit-learn's digits"
        )
        self._wait_for("the host job to learn its bubbles", self._slots_offered)
        for report in cluster.reports():
            self.progress.say(
                f"slot {report.job_id}.{report.node}.{report.local_rank}: stage {report.stage} of {report.num_stages}, "
                f"{100 * report.bubble_s_per_s:.0f} % of its time is usable bubble"
            )
        self._wait_for("both slots to have a bundle at work", self._bundles_at_work)
        self.progress.say("a bundle is at work in each slot; the measured blocks begin")
        cluster.start_measuring()
        study = self._wait_for("the study to finish", self._study_done)
        self.progress.say("study finished; the host job ends at its next block")
        cluster.stop_host()
        self._wait_for("the host job to end", self._host_ended)
        summary = make_summary(cluster, self.host_job_id, self.study_job_id, study, self.evidence)
        (settings.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        self.progress.say("done\n")
        print(table(summary))
        print(f"\nwritten to {settings.output / 'summary.json'}")
        return summary

    def _slots_offered(self) -> bool:
        reports = self.cluster.reports()
        ready = [report for report in reports if report.bubble_s_per_s > 0]
        self.progress.show(
            f"host job {self._state(self.host_job_id, 'RUNNING', 'PENDING')}: {len(ready)} slots offered"
        )
        return len(ready) == 2

    def _bundles_at_work(self) -> bool:
        done = bool(self._study_done())
        return done or self.cluster.bundles_at_work() >= NUM_STAGES

    def _study_done(self) -> Any:
        self._state(self.host_job_id, "RUNNING")
        self.evidence.note(self.cluster.client.steps(self.host_job_id))
        status = self.cluster.status()
        iteration = max((report.iteration for report in self.cluster.reports()), default=0)
        if status:
            counts = " ".join(f"{state} {count}" for state, count in status.counts.items() if count)
            bundles = ", ".join(status.bundles) or "none"
            self.progress.show(f"host iteration {iteration} | study {status.phase}: {counts} | bundles {bundles}")
        summary = self.cluster.summary()
        if summary is None:
            self._state(self.study_job_id, "RUNNING", "PENDING", "COMPLETING", "COMPLETED")
        return summary

    def _host_ended(self) -> bool:
        return self._state(self.host_job_id, "RUNNING", "COMPLETING", "COMPLETED") == "COMPLETED"

    def _state(self, job_id: int, *expected: str) -> str:
        state = self.cluster.client.job(job_id).state
        if state not in expected:
            raise HydroError(
                f"job {job_id} is {state}, expected {' or '.join(expected)}; its output ends:\n{self.cluster.explain()}"
            )
        return state

    def _wait_for(self, what: str, check: Callable[[], T]) -> T:
        while True:
            found = check()
            if found:
                return found
            if time.monotonic() > self.deadline_s:
                raise HydroError(
                    f"gave up waiting for {what} after {self.settings.limit_s:.0f} s; raise --limit-s, or see:\n"
                    f"{self.cluster.explain()}"
                )
            time.sleep(POLL_S)

    def keep_records(self) -> None:
        """Copy what host and study recorded out of the cluster, which goes away.

        Never raises for a file that changes meanwhile: after an interruption the jobs still run.
        """
        output = self.settings.output
        for source, name in ((self.cluster.paths.records, "host"), (self.cluster.study_dir, "study")):
            with contextlib.suppress(OSError):
                shutil.copytree(source, output / name, ignore=shutil.ignore_patterns("*.pt", ".*"))
        for log in self.cluster.paths.root.glob("*.log"):
            with contextlib.suppress(OSError):
                shutil.copy(log, output / log.name)
