"""A user's desk on a testbed: submits light host jobs and studies, waits for what becomes of them."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import TypeVar

from hydro_slurm.model import HOST_COMMENT
from hydro_slurm.slurm import BatchRequest, Job
from hydro_slurm.study.report import StudyStatus, StudySummary, read_status, read_summary
from hydro_slurm.testbed import Testbed

T = TypeVar("T")

HOST_SCRIPT = Path(__file__).with_name("light_host.py")

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
    name="small", build=build, data=data, loss=nn.functional.cross_entropy, optimizer="adam",
    space={"lr": hydro.Float(1e-4, 1e-1, log=True)}, batch_size=16, steps=STEPS, rungs=3, trials=8, max_lanes=4,
    width_scale=4.0, seed=1, top_k=2,
)
"""


class Workbench:
    """One user's home on the shared file system of a testbed."""

    def __init__(self, testbed: Testbed, user: str, name: str) -> None:
        self.testbed, self.user = testbed, user
        self.home = testbed.shared_dir / f"desk-{name}"
        self.client = testbed.client(user=user)
        self.run(["mkdir", "-p", str(self.home)])
        self.jobs: list[int] = []

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "HYDRO_HOME": str(self.home / "hydro"),
            "HYDRO_RUN": f"/dev/shm/hydro-test-{self.home.name}",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, argv: Sequence[str], *, check: bool = True) -> CompletedProcess[str]:
        return self.testbed.run(argv, user=self.user, env=self.environment, check=check, timeout_s=120)

    def hydro(self, *arguments: str, check: bool = True) -> CompletedProcess[str]:
        return self.run([sys.executable, "-m", "hydro_slurm.cli.main", *arguments], check=check)

    def write(self, name: str, text: str) -> Path:
        """A file of the user's."""
        path = self.home / name
        self.testbed.run(["sh", "-c", f"cat > {path}"], user=self.user, stdin=text)
        return path

    def study_file(self, *, steps: int = 300, name: str = "small.py") -> Path:
        return self.write(name, STUDY_TEXT.replace("STEPS", str(steps)))

    def submit_host(self, *, num_nodes: int = 1, name: str = "host") -> int:
        """A host job with one slot per node."""
        command = ["srun", sys.executable, str(HOST_SCRIPT), "--stop-file", str(self.home / f"{name}.stop")]
        job_id = self.client.submit(
            BatchRequest(
                argv=command,
                name=name,
                nodes=num_nodes,
                ntasks_per_node=1,
                cpus_per_task=1,
                mem_mib=4000,
                comment=HOST_COMMENT,
                output=self.home / f"{name}.log",
                work_dir=self.home,
                env=self.environment,
            )
        )
        self.jobs.append(job_id)
        return job_id

    def submit_study(self, file: Path, *options: str) -> tuple[int, Path]:
        """Returns the job's id and the study's directory."""
        done = self.hydro(
            "study", "submit", str(file), "--json", "--poll-s=0.3", "--slurm-poll-s=1", "--mem=500M", *options
        )
        found = json.loads(done.stdout)
        self.jobs.append(found["job_id"])
        return found["job_id"], Path(found["directory"])

    def sbatch_study(self, *arguments: str) -> int:
        """Submit `hydro study run ARGUMENTS` as an ordinary batch script. Returns the job's id."""
        command = shlex.join([sys.executable, "-m", "hydro_slurm.cli.main", "study", "run", *arguments])
        output = self.home / f"sbatch-{len(self.jobs)}.log"
        done = self.run(["sbatch", "--parsable", "--mem=500M", f"--output={output}", "--wrap", f"exec {command}"])
        self.jobs.append(int(done.stdout))
        return self.jobs[-1]

    def wait(self, what: str, check: Callable[[], T | None], *, timeout_s: float = 120.0) -> T:
        """Poll until `check` returns something true."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = check()
            if found:
                return found
            if time.monotonic() > deadline_s:
                raise AssertionError(f"timed out waiting for {what}\n{self.explain()}")
            time.sleep(0.2)

    def wait_summary(self, directory: Path, job_id: int, *, timeout_s: float = 180.0) -> StudySummary:
        """The study's outcome."""

        def check() -> StudySummary | None:
            job: Job = self.client.job(job_id)
            assert not job.ended or job.state == "COMPLETED", f"{job}\n{self.explain()}"
            return read_summary(directory)

        return self.wait("the study's summary", check, timeout_s=timeout_s)

    def status(self, directory: Path) -> StudyStatus | None:
        return read_status(directory)

    def explain(self) -> str:
        """The last lines of everything that was logged."""
        logs = [*self.home.glob("*.log"), *self.home.glob("hydro/studies/*/controller.log")]
        logs += self.home.glob("hydro/studies/*/bundles/*/log")
        return "\n".join(f"--- {path}\n" + "\n".join(path.read_text().splitlines()[-15:]) for path in sorted(logs))

    def clear(self) -> None:
        """Cancel everything that was submitted here."""
        for job_id in self.jobs:
            self.client.cancel(job_id)
        for job_id in self.jobs:
            self.client.wait_job(job_id, timeout_s=60)
