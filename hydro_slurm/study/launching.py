"""How a bundle is started: as an overlapping step of a host job, or as a process in the study's own allocation."""

from __future__ import annotations

from pathlib import Path

from hydro_slurm.errors import SlurmError, SlurmNotFoundError
from hydro_slurm.model import BundleSpec
from hydro_slurm.slurm import SlurmClient, StepProcess, StepRequest
from hydro_slurm.study.description import StudyRecord
from hydro_slurm.study.local_process import LocalProcess


class BundleLauncher:
    """Starts the bundles of one study."""

    def __init__(self, directory: Path, record: StudyRecord, slurm: SlurmClient) -> None:
        self._directory, self._record, self._slurm = directory, record, slurm

    def launch(self, spec: BundleSpec) -> StepProcess:
        """Start a bundle under its supervisor; its output goes to `log` in its directory.

        Raises:
            SlurmError: Slurm refuses the step or does not answer.
        """
        directory = self._directory / "bundles" / spec.bundle
        argv = self._argv(spec, directory)
        environment = {**self._record.environment, "PYTHONUNBUFFERED": "1"}
        if spec.slot.kind == "own":
            return LocalProcess(self.step_name(spec.bundle), argv, env=environment, output=directory / "log")
        return self._slurm.launch_step(
            StepRequest(
                job_id=spec.slot.job_id,
                node=spec.slot.node,
                argv=argv,
                name=self.step_name(spec.bundle),
                mem_mib=self._record.settings.bundle_mem_mib,
                env=environment,
                output=directory / "log",
            )
        )

    def step_name(self, bundle: str) -> str:
        """What Slurm calls a bundle's step."""
        return f"hydro:{self._record.name}:{bundle}"

    def cancel_stale_steps(self, job_ids: list[int]) -> int:
        """Cancel steps that an earlier controller of this study left in these host jobs. Returns how many."""
        count = 0
        for job_id in job_ids:
            try:
                steps = self._slurm.steps(job_id)
            except SlurmNotFoundError:
                continue
            for step in steps:
                if step.name.startswith(f"hydro:{self._record.name}:"):
                    try:
                        self._slurm.cancel(job_id, step_id=step.step_id)
                        count += 1
                    except SlurmError:
                        continue
        return count

    def _argv(self, spec: BundleSpec, directory: Path) -> list[str]:
        argv = [self._record.python, "-m", "hydro_slurm.gate.supervisor", "--bundle", spec.bundle]
        if spec.slot.gate_dir is not None:
            argv += ["--gate-dir", spec.slot.gate_dir]
        return [*argv, "--", self._record.python, "-m", "hydro_trials", "train", str(directory)]
