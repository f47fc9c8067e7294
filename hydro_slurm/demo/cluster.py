"""The demo's actors on its private cluster: a host job and a study, submitted by an ordinary user."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydro_slurm import formats
from hydro_slurm.errors import FormatError, HydroError
from hydro_slurm.examples import example_path
from hydro_slurm.model import HOST_COMMENT, SlotReport
from hydro_slurm.slurm import BatchRequest, CommandLineClient, Step
from hydro_slurm.study.bundle_files import BundleFiles
from hydro_slurm.study.report import StudyStatus, StudySummary, read_status, read_summary
from hydro_slurm.testbed import Testbed

NUM_STAGES = 2
HOST_MEM_MIB = 6000
STUDY_MEM_MIB = 1500


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """Folders of one demo on the testbed's shared file system."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def records(self) -> Path:
        """The host's timelines and blocks."""
        return self.root / "host"

    @property
    def start_file(self) -> Path:
        """The host job begins with the measured blocks once this exists."""
        return self.root / "host" / "start"

    @property
    def stop_file(self) -> Path:
        """The host job ends at the next block once this exists."""
        return self.root / "host" / "stop"


@dataclass(slots=True)
class Evidence:
    """What Slurm itself said during the run: steps seen, and on which node."""

    steps: dict[str, Step] = field(default_factory=dict)

    def note(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.steps[step.step_id] = step

    def bundle_steps(self) -> list[Step]:
        """The bundles among the host job's steps."""
        return [step for step in self.steps.values() if step.name.startswith("hydro:")]


class DemoCluster:
    """Submits the two jobs and watches them."""

    def __init__(self, testbed: Testbed, user: str) -> None:
        self.testbed, self.user = testbed, user
        self.paths = DemoPaths(Path(testbed.shared_dir) / "demo")
        self.client: CommandLineClient = testbed.client(user=user)
        self.study_name = "digits"
        self._extensions: dict[str, str] = {}
        self._run_as_user(["mkdir", "-p", str(self.paths.home), str(self.paths.records)])
        self._take_along_extensions()

    @property
    def environment(self) -> dict[str, str]:
        """What both jobs are given."""
        return {
            **self._extensions,
            "HOME": str(self.paths.home),
            "HYDRO_HOME": str(self.paths.home / ".hydro"),
            # First our own: the extension was built by the ninja of this environment, another would build it anew.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def submit_host(self, arguments: Sequence[str]) -> int:
        """Submit the pipeline-parallel training job: one stage per node."""
        script = example_path("char_gpt_pipeline.py")
        command = [sys.executable, str(script), "--timeline-dir", str(self.paths.records)]
        command += [f"--start-file={self.paths.start_file}", f"--stop-file={self.paths.stop_file}", *arguments]
        return self.client.submit(
            BatchRequest(
                argv=["srun", *command],
                name="char-gpt",
                nodes=NUM_STAGES,
                ntasks_per_node=1,
                cpus_per_task=2,
                mem_mib=HOST_MEM_MIB,
                comment=HOST_COMMENT,
                output=self.paths.root / "host.log",
                env=self.environment,
                work_dir=self.paths.root,
            )
        )

    def submit_study(self, num_trials: int) -> int:
        """Submit the study as its researcher would."""
        argv = [sys.executable, "-m", "hydro_slurm.cli.main", "study", "submit", str(example_path("digits_study.py"))]
        argv += ["--name", self.study_name, "--trials", str(num_trials), "--timeline", "--json"]
        argv += ["--own-allocation", "never", "--slurm-poll-s", "3"]
        argv += [f"--mem={STUDY_MEM_MIB}M", "--cpus-per-task=2", "--time=60"]
        done = self._run_as_user(argv)
        return int(json.loads(done)["job_id"])

    @property
    def study_dir(self) -> Path:
        return self.paths.home / ".hydro" / "studies" / self.study_name

    def reports(self) -> list[SlotReport]:
        """The slots that the host offers now."""
        found = []
        for path in sorted((self.paths.home / ".hydro" / "slots").glob("[0-9]*.json")):
            try:
                found.append(formats.read_record(SlotReport, path))
            except (FormatError, OSError):
                continue
        return found

    def status(self) -> StudyStatus | None:
        """The study's newest status."""
        try:
            return read_status(self.study_dir)
        except FormatError:
            return None

    def summary(self) -> StudySummary | None:
        """The study's outcome, once it has one."""
        return read_summary(self.study_dir)

    def bundles_at_work(self) -> int:
        """How many bundles train lanes now."""
        bundles = self.study_dir / "bundles"
        found = [BundleFiles(path).progress() for path in bundles.iterdir()] if bundles.is_dir() else []
        return sum(progress is not None and progress.state == "running" for progress in found)

    def start_measuring(self) -> None:
        """Let the host job begin with the measured blocks."""
        self._run_as_user(["touch", str(self.paths.start_file)])

    def stop_host(self) -> None:
        """Let the host job end at its next block."""
        self._run_as_user(["touch", str(self.paths.stop_file)])

    def explain(self) -> str:
        """The last lines of both jobs' output, for an error message."""
        parts = []
        for path in (self.paths.root / "host.log", self.study_dir / "controller.log"):
            if path.exists():
                lines = path.read_text(errors="replace").splitlines()[-12:]
                parts.append(f"--- {path.name}\n" + "\n".join(lines))
        return "\n".join(parts)

    def _take_along_extensions(self) -> None:
        """Give the user a copy of DeepSpeed's compiled extension: loading it locks a file in its folder."""
        built = os.environ.get("TORCH_EXTENSIONS_DIR")
        if built and Path(built).is_dir():
            own = self.paths.root / "torch_extensions"
            self._run_as_user(["cp", "-r", "--preserve=timestamps,mode", built, str(own)])
            self._extensions = {"TORCH_EXTENSIONS_DIR": str(own)}

    def _run_as_user(self, argv: list[str]) -> str:
        done = self.testbed.run(argv, user=self.user, env=self.environment, check=False, timeout_s=300)
        if done.returncode != 0:
            raise HydroError(f"as user {self.user}, {argv[0]} failed: {done.stderr.strip()}")
        return done.stdout
