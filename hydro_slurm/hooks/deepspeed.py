"""Shares the bubbles of a DeepSpeed pipeline engine: `share_bubbles(engine)` after `deepspeed.initialize`.

Nothing is forked and nothing that computes is changed: the engine *instance* gets a wrapped instruction map, and the
wrappers only look at the clock. Compute is hooked, not receive: a bubble is the complement of compute. The trailing
bubble hides in the all-reduce of gradient clipping inside OptimizerStep, so within that instruction everything counts
as compute except the all-reduces themselves.

Importable without torch and DeepSpeed. Found in DeepSpeed 0.19.8; host timestamps mean something where a receive
blocks the thread (gloo, CPU).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

from hydro_slurm.errors import ConfigError
from hydro_slurm.gate.writer import GateWriter
from hydro_slurm.hooks.guard import Guard
from hydro_slurm.hooks.prediction import GapPredictor
from hydro_slurm.hooks.reporter import BubbleReporter, Iteration
from hydro_slurm.hooks.slot_reports import REPORT_S, SlotIdentity, SlotReports
from hydro_slurm.model import Device, gate_dir, run_dir, slot_report_dir
from hydro_slurm.timeline import TimelineWriter

_log = logging.getLogger(__name__)


class Attachment:
    """A hook in place. Without `reporter` (None) attaching failed, and training goes on alone."""

    def __init__(self) -> None:
        self.reporter: Optional[BubbleReporter] = None
        self.reports: Optional[SlotReports] = None
        self.identity: Optional[SlotIdentity] = None
        self._restore: list[Callable[[], None]] = []
        self._pid = os.getpid()

    def set_mode(self, mode: str) -> None:
        """See `BubbleReporter.set_mode`."""
        if self.reporter is not None:
            self.reporter.set_mode(mode)

    @contextlib.contextmanager
    def suspended(self, *, aligned: bool = False) -> Iterator[None]:
        """Around anything that is not training: the gate is closed, nothing is learned or measured."""
        if self.reporter is None:
            yield
            return
        self.reporter.suspend()
        try:
            yield
        finally:
            self.reporter.resume(aligned=aligned)

    def close(self) -> None:
        """Gate gone, report removed, engine as it was. Never raises; may be called again."""
        if os.getpid() != self._pid:
            return  # a forked child does not own the gate
        atexit.unregister(self.close)
        if self.reporter is not None:
            self.reporter.leave()
        if self.reports is not None:
            self.reports.stop()
        while self._restore:
            with contextlib.suppress(Exception):
                self._restore.pop()()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute until `close`."""
        had, before = name in vars(owner), vars(owner).get(name)
        setattr(owner, name, value)
        self._restore.append(lambda: setattr(owner, name, before) if had else delattr(owner, name))


def share_bubbles(
    engine: Any,
    *,
    max_slowdown: float = 0.01,
    control_share: float = 0.05,
    quantile: float = 0.25,
    window: int = 12,
    report_s: float = REPORT_S,
    report_dir: Optional[Path] = None,
    run_directory: Optional[Path] = None,
    timeline_dir: Optional[Path] = None,
    on_iteration: Optional[Callable[[Iteration], None]] = None,
) -> Attachment:
    """Offer the bubbles of a pipeline engine. A collective call: every rank makes it, once, after initialisation.

    Args:
        engine: What `deepspeed.initialize` returned for a `PipelineModule`.
        max_slowdown: Bound of the guard, as a fraction of the iteration time.
        control_share: Share of iterations that keep all gates closed, as the guard's comparison.
        quantile: Quantile of the remembered gap durations that is promised to a bundle.
        window: How many durations are remembered per gap.
        report_s: Seconds between two slot reports.
        report_dir: Where slot reports go; default `$HYDRO_REPORT_DIR`, else `~/.hydro/slots`.
        run_directory: Where gates live; default `$HYDRO_RUN`, else `/dev/shm/hydro-UID`.
        timeline_dir: Where to record a timeline; default `$HYDRO_TIMELINE_DIR`, else none is recorded.
        on_iteration: Called on the training thread after each measured iteration.

    Returns:
        The attachment. Whatever goes wrong is logged once and leaves the engine alone: nothing is raised for it.

    Raises:
        ConfigError: A setting has a value that cannot work.
    """
    for name, value in (("max_slowdown", max_slowdown), ("control_share", control_share), ("quantile", quantile)):
        if not 0 < value < 1:
            raise ConfigError(f"share_bubbles: {name} must lie between 0 and 1, got {value}")
    if window < 4:
        raise ConfigError(f"share_bubbles: window must be at least 4, got {window}")
    attachment = Attachment()
    try:
        # First, because the other ranks wait in it: whatever fails here later must not leave them hanging.
        secret = _share_secret()
        identity = _identify(engine, run_directory or run_dir())
        timeline = _open_timeline(timeline_dir, identity)
        publisher = GateWriter.create(identity.gate_dir, stage=identity.stage, num_stages=identity.num_stages)
        reporter = BubbleReporter(
            publisher,
            secret=secret,
            control_share=control_share,
            predictor=GapPredictor(quantile=quantile, window=window),
            guard=Guard(max_slowdown=max_slowdown),
            timeline=timeline,
            stage=identity.stage,
            iteration=engine.global_steps,
            on_iteration=on_iteration,
        )
        attachment.reporter, attachment.identity = reporter, identity
        directory = report_dir or slot_report_dir()
        reports = SlotReports(reporter, identity, directory, report_s=report_s, timeline=timeline)
        attachment.reports, reporter.on_learned = reports, reports.wake
        _hook(engine, attachment, reporter)
        atexit.register(attachment.close)
        reports.start()
    except Exception as error:
        _log.warning("bubbles are not shared, training goes on: %s: %s", type(error).__name__, error)
        attachment.close()
        attachment.reporter = None
    return attachment


def _hook(engine: Any, attachment: Attachment, reporter: BubbleReporter) -> None:
    schedule = importlib.import_module("deepspeed.runtime.pipe.schedule")
    instructions = dict(engine._INSTRUCTION_MAP)
    microbatches = {"forward": 0, "backward": 0}

    def wrap(kind: str, inner: Callable[..., Any], *, ends: bool = True) -> Callable[..., Any]:
        def instruction(self: Any, *args: Any, **kwargs: Any) -> Any:
            reporter.compute_begin(kind, microbatch=microbatches.get(kind))
            result = inner(self, *args, **kwargs)
            if ends:
                reporter.compute_end()
                microbatches[kind] = microbatches.get(kind, 0) + 1
            return result

        return instruction

    def optimizer_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        reporter.compute_begin("step")
        with _waiting_in_all_reduce(reporter):
            result = instructions[schedule.OptimizerStep](self, *args, **kwargs)
        reporter.step_end(self.global_steps)
        return result

    wrapped = dict(instructions)
    wrapped[schedule.LoadMicroBatch] = wrap("forward", instructions[schedule.LoadMicroBatch], ends=False)
    wrapped[schedule.ForwardPass] = wrap("forward", instructions[schedule.ForwardPass])
    wrapped[schedule.BackwardPass] = wrap("backward", instructions[schedule.BackwardPass])
    wrapped[schedule.OptimizerStep] = optimizer_step
    if engine.dp_world_size == 1:
        # Copies gradients and reduces them over one rank: compute. With more ranks it waits for them.
        wrapped[schedule.ReduceGrads] = wrap("step", instructions[schedule.ReduceGrads], ends=False)
    attachment.replace(engine, "_INSTRUCTION_MAP", wrapped)

    def outside_training(name: str) -> None:
        inner = getattr(engine, name)

        @functools.wraps(inner)
        def method(*args: Any, **kwargs: Any) -> Any:
            with attachment.suspended():
                return inner(*args, **kwargs)

        attachment.replace(engine, name, method)

    for name in ("eval_batch", "save_checkpoint", "load_checkpoint"):
        outside_training(name)

    inner_train_batch, inner_destroy = engine.train_batch, engine.destroy

    @functools.wraps(inner_train_batch)
    def train_batch(*args: Any, **kwargs: Any) -> Any:
        reporter.set_schedule(("deepspeed", type(engine).__name__, engine.num_stages, engine.micro_batches))
        microbatches.update(forward=0, backward=0)
        try:
            return inner_train_batch(*args, **kwargs)
        except BaseException:
            reporter.suspend()  # who knows where in the iteration this was
            reporter.resume()
            raise

    @functools.wraps(inner_destroy)
    def destroy(*args: Any, **kwargs: Any) -> Any:
        attachment.close()
        return inner_destroy(*args, **kwargs)

    attachment.replace(engine, "train_batch", train_batch)
    attachment.replace(engine, "destroy", destroy)


@contextlib.contextmanager
def _waiting_in_all_reduce(reporter: BubbleReporter) -> Iterator[None]:
    """While this lasts, an all-reduce of DeepSpeed's gradient clipping counts as a gap within compute.

    `deepspeed.runtime.utils` calls `dist.all_reduce`, where `dist` is a global of that module: for the duration of one
    instruction it is a stand-in that passes everything on.
    """
    utilities: Any = importlib.import_module("deepspeed.runtime.utils")
    before = utilities.dist
    utilities.dist = _CommunicationWithGaps(before, reporter)
    try:
        yield
    finally:
        utilities.dist = before


class _CommunicationWithGaps:
    def __init__(self, inner: Any, reporter: BubbleReporter) -> None:
        self._inner, self._reporter = inner, reporter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def all_reduce(self, *args: Any, **kwargs: Any) -> Any:
        self._reporter.compute_end()
        try:
            return self._inner.all_reduce(*args, **kwargs)
        finally:
            self._reporter.compute_begin("step")


def _share_secret() -> bytes:
    distributed = importlib.import_module("torch.distributed")
    if not distributed.is_initialized():
        return secrets.token_bytes(16)
    secret = [secrets.token_bytes(16)]
    distributed.broadcast_object_list(secret, src=0)
    return secret[0]


def _identify(engine: Any, run_directory: Path) -> SlotIdentity:
    environ = os.environ
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    job_id = int(environ.get("SLURM_JOB_ID") or os.getpid())
    local_rank = int(environ.get("SLURM_LOCALID") or environ.get("LOCAL_RANK") or 0)
    return SlotIdentity(
        node=node,
        job_id=job_id,
        local_rank=local_rank,
        global_rank=int(engine.global_rank),
        stage=int(engine.stage_id),
        num_stages=int(engine.num_stages),
        device=Device("cpu", local_rank, tuple(sorted(os.sched_getaffinity(0)))),
        gate_dir=gate_dir(run_directory, node, job_id, local_rank),
    )


def _open_timeline(directory: Optional[Path], identity: SlotIdentity) -> Optional[TimelineWriter]:
    named = os.environ.get("HYDRO_TIMELINE_DIR")
    directory = directory or (Path(named) if named else None)
    if directory is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"host.{identity.job_id}.{identity.node}.{identity.local_rank}.jsonl"
        return TimelineWriter(path, identity.node, identity.job_id, identity.local_rank)
    except OSError as error:
        _log.warning("no timeline is recorded: %s", error)
        return None
