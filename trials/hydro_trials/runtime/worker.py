"""The training loop of one bundle: lanes in, results and checkpoints out, a boundary between any two quanta.

Whatever happens, a trial's results come in order, each written before anything else counts it; a checkpoint holds a
whole number of steps; and a lane that ends badly takes no other with it.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hydro_slurm.clock import Clock
from hydro_slurm.errors import FormatError, GateGoneError, HydroError
from hydro_slurm.model import COMPLETE, DIVERGED, FAIL, RUNNING, BundleSpec, LaneSpec, TrialResult
from hydro_trials.fusion import FusedTrainer, sites
from hydro_trials.fusion.program import SEPARATE
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.planner.memory import give_back_free, is_out_of_memory, resident_bytes
from hydro_trials.runtime.bundle_dir import BundleDir
from hydro_trials.runtime.checkpoints import Checkpoint, newest_checkpoint, write_checkpoint
from hydro_trials.runtime.gating import BundleGate, LeaveRequested
from hydro_trials.runtime.plan import LanePlan
from hydro_trials.runtime.progress import ProgressReporter
from hydro_trials.study import Study
from hydro_trials.study_file import describe_error

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_GATE_GONE = 0, 76
INBOX_POLL_S = 0.25
STEPS_PER_FINITE_CHECK = 8
CAP_SHARE = 0.95
"""Share of the memory cap at which lanes are given up, before the kernel ends the process."""


class Finish(Exception):  # noqa: N818  # a way out, not an error
    """The controller, or having nothing to do, ends this bundle."""


@dataclass
class LaneAccount:
    """What the worker knows of a lane beside its training state."""

    spec: LaneSpec
    next_rung: int
    lane_seconds_before: float
    """Its share of computing time when it was admitted, less the bundle's share counter at that moment."""


class BundleWorker:
    """Runs the lanes of one bundle until there is nothing left to do, or it has to leave."""

    def __init__(
        self,
        spec: BundleSpec,
        files: BundleDir,
        study: Study,
        trainer: FusedTrainer,
        plan: LanePlan,
        gate: BundleGate,
        clock: Clock,
    ) -> None:
        self.spec, self.study, self.trainer, self._plan = spec, study, trainer, plan
        self._files, self._gate, self._clock = files, gate, clock
        self.max_lanes = plan.most_lanes(spec)
        self.waiting: deque[LaneSpec] = deque()
        self.accounts: dict[int, LaneAccount] = {}
        self.checkpoints: dict[int, str] = {}
        self.lane_steps = 0
        self._share_s = 0.0
        self._counted_ns = gate.compute_ns
        self._warning = ""
        now_ns = clock.monotonic_ns()
        self._next_poll_ns = self._next_tick_ns = now_ns
        self._next_checkpoint_ns = now_ns + round(spec.checkpoint_every_s * 1e9)
        self._reporter = ProgressReporter(spec, files, gate, clock)

    def run(self) -> int:
        """Work until the end; returns the process's exit status."""
        status, why = EXIT_OK, "nothing left to do"
        self._files.event("started", lanes=len(self.spec.lanes), max_lanes=self.max_lanes)
        try:
            self._enqueue(self.spec.lanes)
            self._loop()
        except Finish as end:
            why = str(end)
        except LeaveRequested:
            why = "SIGTERM"
        except GateGoneError as error:
            status, why = EXIT_GATE_GONE, str(error)
        self._leave(why)
        return status

    def _loop(self) -> None:
        idle_since_ns: int | None = None
        while True:
            self._house_keeping()
            if not self.accounts and not self.waiting:
                now_ns = self._clock.monotonic_ns()
                idle_since_ns = idle_since_ns or now_ns
                if (now_ns - idle_since_ns) / 1e9 >= self.spec.idle_exit_s:
                    raise Finish("idle")
                self._gate.rest(INBOX_POLL_S)
                continue
            idle_since_ns = None
            try:
                self._admit()
                if self.accounts:
                    self._step()
            except (GateGoneError, Finish):
                raise
            except Exception as error:
                if is_out_of_memory(error) and self._halve(f"out of memory: {self._explain(error)}"):
                    continue
                self._fail_culprits(error)

    def _house_keeping(self) -> None:
        """Inbox, progress and periodic checkpoints, when they are due."""
        now_ns = self._clock.monotonic_ns()
        if now_ns >= self._next_poll_ns:
            self._next_poll_ns = now_ns + round(INBOX_POLL_S * 1e9)
            self._read_inbox()
        if now_ns >= self._next_checkpoint_ns:
            for trial in self.trainer.trials:
                self._gate.check(sites.SAVE)
                self._save(trial)
            self._next_checkpoint_ns = self._clock.monotonic_ns() + round(self.spec.checkpoint_every_s * 1e9)
        if now_ns >= self._next_tick_ns:
            self._next_tick_ns = now_ns + 1_000_000_000
            self._files.retry_results()
            self._keep_to_cap()
            self._report("running" if self.accounts or self.waiting else "idle")

    def _read_inbox(self) -> None:
        for message in self._files.new_messages():
            self._files.event("message", kind=message.kind, number=self._files.last_inbox, reason=message.reason)
            if message.kind == "refill":
                self._enqueue(message.lanes)
            elif message.kind == "stop":
                self._stop(message.trials)
            elif message.kind == "resize" and message.max_lanes >= 1:
                self._resize(message.max_lanes)
            elif message.kind == "finish":
                raise Finish(message.reason or "finish")
            else:
                logger.error("bundle=%s message of unknown kind %r is left out", self.spec.bundle, message.kind)

    def _enqueue(self, lanes: Iterable[LaneSpec]) -> None:
        for lane in lanes:
            if lane.trial in self.accounts or any(lane.trial == other.trial for other in self.waiting):
                continue
            if self._files.has_ended(lane.trial):
                continue  # this bundle was started again after it had finished that trial
            if lane.checkpoint is not None:
                self.checkpoints[lane.trial] = lane.checkpoint
            self.waiting.append(lane)

    def _admit(self) -> None:
        while self.waiting and len(self.accounts) < self.max_lanes:
            self._gate.check(sites.ADMIT)
            lane = self.waiting.popleft()
            try:
                step = self._admit_one(lane)
            except Exception as error:
                if is_out_of_memory(error) and self.accounts:
                    self.waiting.appendleft(lane)
                    self.max_lanes = len(self.accounts)
                    self._warn(f"out of memory, {self.max_lanes} lanes fit: {self._explain(error)}")
                    return
                self._write(lane.trial, 0, 0, FAIL, reason=self._explain(error))
                self.checkpoints.pop(lane.trial, None)
                continue
            if step >= self.spec.rungs[self.accounts[lane.trial].next_rung]:
                self._evaluate([lane.trial])

    def _admit_one(self, lane: LaneSpec) -> int:
        values = resolve_hyperparameters(self.study.optimizer, self.study.schedule, self.study.fixed, lane.params)
        checkpoint = newest_checkpoint(self._files.lanes, lane, self.spec.width_scale, self._on_bad_checkpoint)
        self.trainer.admit(lane.trial, lane.seed, values, checkpoint.state if checkpoint else None)
        self._lanes_changed()
        self._count_share()
        step = checkpoint.state.step if checkpoint else 0
        seconds = checkpoint.lane_seconds if checkpoint else 0.0
        # A checkpoint at a rung's very step may stem from before its result was written: that rung is done again.
        rung = next((i for i, at in enumerate(self.spec.rungs) if at >= step), len(self.spec.rungs) - 1)
        self.accounts[lane.trial] = LaneAccount(lane, rung, seconds - self._share_s)
        self._files.event("admitted", trial=lane.trial, step=step)
        return step

    def _on_bad_checkpoint(self, trial: int, error: FormatError) -> None:
        logger.error("bundle=%s trial=%d: %s", self.spec.bundle, trial, error)
        self._files.event("bad_checkpoint", trial=trial, reason=str(error))

    def _step(self) -> None:
        self.trainer.step()
        if self.trainer.refusal is not None and self.max_lanes > 1:
            self._warn(str(self.trainer.refusal))
            self._resize(1)
        num_lanes = len(self.trainer.lanes)
        self.lane_steps += num_lanes
        self._reporter.step_done()
        self._count_share()
        due = [
            lane.trial
            for lane in self.trainer.lanes
            if lane.step >= self.spec.rungs[self.accounts[lane.trial].next_rung]
        ]
        if due or self.trainer.lanes[0].step % STEPS_PER_FINITE_CHECK == 0:
            self._end_diverged(thorough=bool(due))
            due = [trial for trial in due if trial in self.accounts]
        if due:
            self._evaluate(due)

    def _end_diverged(self, *, thorough: bool) -> None:
        for trial, (step, reason) in self.trainer.diverged(thorough=thorough).items():
            self._end(trial, step, DIVERGED, reason=reason)

    def _evaluate(self, trials: Collection[int]) -> None:
        """Write the result of the rung that each of these lanes has reached."""
        failures: dict[int, Exception] = {}
        evaluations = self.trainer.evaluate(trials, failures)
        for trial, error in failures.items():
            self._fail([trial], self._explain(error))
        for trial, metrics in evaluations.items():
            self._gate.check(sites.SAVE)
            lane, account = self.trainer.lane(trial), self.accounts[trial]
            metrics["train.loss"] = self.trainer.loss(trial)
            value = metrics[self.study.objective]
            if not math.isfinite(value):
                self._end(trial, lane.step, DIVERGED, metrics, reason=f"{self.study.objective} is not finite")
            elif account.next_rung == len(self.spec.rungs) - 1:
                self._end(trial, lane.step, COMPLETE, metrics)
            else:
                path = self._save(trial)  # first: a result and the checkpoint that it names agree
                self._write(trial, account.next_rung, lane.step, RUNNING, metrics, checkpoint=path)
                account.next_rung += 1

    def _end(
        self, trial: int, step: int, state: str, metrics: dict[str, float] | None = None, *, reason: str = ""
    ) -> None:
        self._write(trial, self.accounts[trial].next_rung, step, state, metrics, reason=reason)
        self._forget([trial])

    def _fail(self, trials: Collection[int], reason: str) -> None:
        logger.error("bundle=%s trials=%s failed: %s", self.spec.bundle, list(trials), reason)
        for trial in list(trials):
            self._end(trial, self.trainer.lane(trial).step, FAIL, reason=reason)

    def _fail_culprits(self, error: Exception) -> None:
        """A step has raised: end the lanes that raise when they are alone, and only them."""
        if self.trainer.torn:
            self._fail(self.trainer.trials, self._explain(error))
            return
        culprits = self.trainer.culprits()
        for trial, own_error in culprits.items():
            self._fail([trial], self._explain(own_error))
        if culprits:
            return
        if self.trainer.is_used(SEPARATE, None):  # alone, nobody raises; so it is not the lanes' doing
            self._fail(self.trainer.trials, self._explain(error))
            return
        self._warn(f"lanes are run one by one from now on: {self._explain(error)}")
        self._plan = LanePlan(None)
        self.trainer.use(SEPARATE)

    def _stop(self, trials: Collection[int]) -> None:
        self.waiting = deque(lane for lane in self.waiting if lane.trial not in trials)
        self._forget([trial for trial in trials if trial in self.accounts])
        for trial in trials:
            self.checkpoints.pop(trial, None)

    def _forget(self, trials: Collection[int]) -> None:
        self._count_share()
        self.trainer.drop(trials)
        self._lanes_changed()
        for trial in trials:
            del self.accounts[trial]
            self.checkpoints.pop(trial, None)

    def _write(
        self,
        trial: int,
        rung: int,
        step: int,
        state: str,
        metrics: dict[str, float] | None = None,
        *,
        reason: str = "",
        checkpoint: str | None = None,
    ) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in (metrics or {}).items()}
        result = TrialResult(
            trial=trial,
            rung=rung,
            step=step,
            state=state,
            value=finite.get(self.study.objective),
            metrics=finite,
            bundle=self.spec.bundle,
            lane_seconds=self._lane_seconds(trial),
            written_at_s=self._clock.wall_s(),
            reason=reason,
            checkpoint=checkpoint,
        )
        self._files.write_result(result)
        self._files.event("result", trial=trial, rung=rung, step=step, state=state, value=result.value, reason=reason)

    def _save(self, trial: int) -> str | None:
        """Checkpoint one lane; a disk that is full or away costs the checkpoint, not the training."""
        checkpoint = Checkpoint(trial, self.spec.width_scale, self._lane_seconds(trial), self.trainer.state(trial))
        try:
            path = str(write_checkpoint(self._files.lanes, checkpoint).absolute())
        except OSError as error:
            logger.error("bundle=%s trial=%d: no checkpoint: %s", self.spec.bundle, trial, error)
            return None
        self.checkpoints[trial] = path
        return path

    def _halve(self, reason: str) -> bool:
        """Go on with half of the lanes, if there is more than one."""
        if len(self.accounts) <= 1:
            return False
        self._warn(f"{len(self.accounts)} lanes are too many, half of them go on: {reason}")
        self._resize(len(self.accounts) // 2)
        return True

    def _keep_to_cap(self) -> None:
        cap_bytes = self.spec.memory_cap_bytes
        if cap_bytes is None or resident_bytes(self.trainer.device) <= CAP_SHARE * cap_bytes:
            return
        give_back_free(self.trainer.device)  # what malloc keeps for the next step is not needed by it
        held_bytes = resident_bytes(self.trainer.device)
        if held_bytes > CAP_SHARE * cap_bytes:
            self._halve(f"holding {held_bytes} bytes, the cap is {cap_bytes}")

    def _resize(self, max_lanes: int) -> None:
        """Change the max fusion count; lanes beyond it go on later, from a checkpoint."""
        self.max_lanes = max_lanes
        # A lane that was being updated when memory ended is no whole step: it goes back to its last checkpoint.
        torn = self.trainer.torn
        surplus = self.trainer.trials if torn else self.trainer.trials[max_lanes:]
        for trial in reversed(surplus):
            path = self.checkpoints.get(trial) if torn else self._save(trial)
            self.waiting.appendleft(replace(self.accounts[trial].spec, checkpoint=path))
        self._forget(surplus)
        self.checkpoints.update({lane.trial: lane.checkpoint for lane in self.waiting if lane.checkpoint})
        self._files.event("resized", max_lanes=max_lanes, waiting=len(self.waiting))

    def _warn(self, what: str) -> None:
        logger.warning("bundle=%s %s", self.spec.bundle, what)
        self._files.event("warning", reason=what)
        self._warning = what

    def _lanes_changed(self) -> None:
        self._reporter.lanes_changed(len(self.trainer.lanes))
        self._plan.apply(self.trainer)

    def _leave(self, why: str) -> None:
        """Checkpoint every lane. Runs while the gate is closed or gone, so it does nothing else."""
        self._gate.begin_leaving()
        if not self.trainer.torn:
            for trial in self.trainer.trials:
                self._save(trial)
        self._files.retry_results()
        self._files.event("left", reason=why, lanes=len(self.accounts), waiting=len(self.waiting))
        self._report("ended")
        self._gate.close()

    def _explain(self, error: Exception) -> str:
        if isinstance(error, HydroError):
            return str(error)
        return describe_error(error, Path(self.spec.study_file))

    def _count_share(self) -> None:
        """Add the computing time since the last call, divided among the lanes, to the share of each."""
        now_ns = self._gate.compute_ns
        if self.trainer.lanes:
            self._share_s += (now_ns - self._counted_ns) / 1e9 / len(self.trainer.lanes)
        self._counted_ns = now_ns

    def _lane_seconds(self, trial: int) -> float:
        account = self.accounts.get(trial)
        return account.lane_seconds_before + self._share_s if account else 0.0

    def _report(self, state: str) -> None:
        steps = {str(lane.trial): lane.step for lane in self.trainer.lanes}
        for lane in self.waiting:
            steps.setdefault(str(lane.trial), 0)
        self._reporter.write(
            state,
            num_lanes=len(self.accounts),
            num_waiting=len(self.waiting),
            lane_steps=self.lane_steps,
            checkpoints={str(trial): path for trial, path in self.checkpoints.items()},
            steps=steps,
            max_lanes=self.max_lanes,
            warning=self._warning,
        )
