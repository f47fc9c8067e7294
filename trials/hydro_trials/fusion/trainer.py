"""F lanes of one study, trained as one program. Lanes come and go; none of them notices the others.

A step is a transaction: everything that may block or be interrupted (data, forward, backward) works on copies or leaves
the lanes untouched; then parameters, optimizer state, buffers and step counters change together. So the gate may throw
the bundle out at any boundary, and what is then checkpointed is the state after a whole number of steps.

Shape suffixes: F = lanes, B = samples per lane, P = values per row, N = samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hydro_slurm.errors import FusionError, HydroError
from hydro_trials.fusion import sites
from hydro_trials.fusion.agreement import check_agreement, tolerance_of
from hydro_trials.fusion.fast import FastProgram
from hydro_trials.fusion.general import GeneralProgram
from hydro_trials.fusion.holder import LaneHolder
from hydro_trials.fusion.program import GENERAL, PRECISIONS, SEPARATE, Check, Gradients, Program
from hydro_trials.fusion.programs import make_program
from hydro_trials.fusion.refusal import NotFusableError
from hydro_trials.fusion.separate import SeparateProgram
from hydro_trials.fusion.streams import derive_seed, make_batch
from hydro_trials.samples import call_model
from hydro_trials.study import Data, Study
from hydro_trials.surrogate import Surrogate, check_readouts

logger = logging.getLogger(__name__)

T = TypeVar("T")


class FusedTrainer(LaneHolder):
    """Trains lanes that differ in hyperparameters, seed and progress.

    Args:
        study: What is trained.
        surrogate: The model at the width of these lanes.
        data: The study's samples.
        num_steps: The whole budget, which schedules refer to.
        check: Called at every boundary between quanta. It may raise: the step is then as if never begun.
        kind: How lanes are run; a model that cannot be fused is run lane by lane, whatever is asked.
        device: Where lanes live; samples are copied there once.
    """

    def __init__(
        self,
        study: Study,
        surrogate: Surrogate,
        data: Data,
        num_steps: int,
        check: Check,
        *,
        kind: str = GENERAL,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(study, surrogate, data, num_steps, device)
        self.check = check
        self.refusal: NotFusableError | None = None
        """Why lanes run one by one, where the model left no choice."""
        self.program: Program
        self._programs: dict[tuple[str, int | None], Program] = {}
        self.use(kind)
        self._checked_readouts = False
        self._late: BaseException | None = None
        self._unused: list[slice] = []

    def use(self, kind: str, *, depth: int | None = None) -> None:
        """Run lanes another way from the next step on.

        Raises:
            FusionError: The model cannot be run that way.
        """
        key = (kind, depth)
        if key not in self._programs:
            self._programs[key] = self._make_program(kind, depth)
        self.program = self._programs[key]
        self.program.set_check(self.check)

    def is_used(self, kind: str, depth: int | None) -> bool:
        """Whether lanes are run this way now."""
        return self._programs.get((kind, depth)) is self.program

    def compare(self, kind: str) -> None:
        """Make sure that another way of running gives the general path's numbers on the lanes' next batch.

        Raises:
            FusionError: It cannot run this model, or gives others.
        """
        places = [lane.place for lane in self.lanes]
        batch = make_batch(self.data, places, 0, self.study.accumulate)
        self.use(GENERAL)
        reference = self.program
        try:
            self.use(kind)
        except HydroError:
            raise
        except Exception as error:
            raise FusionError(f"the {kind} path cannot be made: {type(error).__name__}: {error}") from error
        tolerance = tolerance_of(self.layout.dtype, lower=self.study.precision != "full")
        check_agreement(self.program, reference, self._parameters, self._stack.buffers, batch, tolerance)

    def split(self, trials: Collection[int]) -> FusedTrainer:
        """Move lanes, as they are, to a new trainer.

        Raises:
            FusionError: One of them is not here.
        """
        rows = [self._row(trial) for trial in trials]
        other = FusedTrainer(
            self.study,
            self.surrogate,
            self.data,
            self.num_steps,
            self.check,
            kind=self.program.kind,
            device=self.device,
        )
        other._install(self._stack.select(rows), [self.lanes[row] for row in rows])
        self.drop(trials)
        return other

    def step(self) -> None:
        """One optimizer step of every lane."""
        stack = self._stack
        losses_F, grad_FP, buffers = self._fallible(self._gradients)
        self.check(sites.UPDATE)
        self.torn = True
        idle = [(t[:, part], t[:, part].clone()) for t in (stack.flat, *stack.slots.values()) for part in self._unused]
        self.optimizer.update(
            stack.flat, grad_FP, stack.slots, [lane.settings for lane in self.lanes], self._quiet_check
        )
        for now, before in idle:
            now.copy_(before)
        stack.buffers, stack.losses = buffers, losses_F
        stack.finite &= losses_F.isfinite()
        stack.num_finite += stack.finite
        for lane in self.lanes:
            lane.advance(lane.step + 1)
        self.torn = False
        self._raise_late()

    def loss(self, trial: int) -> float:
        """The lane's loss on its last training batch; not a number before its first step here."""
        return float(self._stack.losses[self._row(trial)])

    def diverged(self, *, thorough: bool) -> dict[int, tuple[int, str]]:
        """Lanes that are no longer finite: trial to (last finite step, reason).

        Args:
            thorough: Look at parameters too, not only at the losses seen since the lane began.
        """
        bad_F = ~self._stack.finite
        weights_F = ~self._stack.flat.isfinite().all(dim=1) if thorough else torch.zeros_like(bad_F)
        found = {}
        for row in (bad_F | weights_F).nonzero().flatten().tolist():
            step = int(self._stack.num_finite[row])
            if bool(bad_F[row]):
                reason = f"training loss was not finite at step {step + 1}"
            else:
                reason = f"parameters are not finite after step {step}"
            found[self.lanes[row].trial] = (step, reason)
        return found

    def evaluate(
        self, trials: Collection[int], failures: dict[int, Exception] | None = None
    ) -> dict[int, dict[str, float]]:
        """The loss and every metric on the validation set, by trial; keys `valid.loss`, `valid.NAME`.

        Args:
            trials: Whom to evaluate.
            failures: Takes the exception of each lane whose loss or metric raises; without it, the first is raised.
        """
        rows = [row for row, lane in enumerate(self.lanes) if lane.trial in trials]
        chosen = self._stack.select(rows)
        lanes = [self.lanes[row] for row in rows]
        seeds = tuple(derive_seed(lane.seed, "evaluation", lane.step) for lane in lanes)
        x_N, y_N = self.data.valid
        views = self.layout.views(chosen.flat)
        outputs_FN = self._fallible(
            lambda: self.program.outputs(views, chosen.buffers, x_N, self.study.batch_size, seeds)
        )
        results: dict[int, dict[str, float]] = {}
        for row, lane in enumerate(lanes):
            self.check(sites.MEASURE)
            output_N = tree_map(lambda leaf, row=row: leaf[row] if isinstance(leaf, Tensor) else leaf, outputs_FN)
            try:
                with torch.no_grad():
                    values = {"valid.loss": float(self.study.loss(output_N, y_N))}
                    for name, metric in self.study.metrics.items():
                        values[f"valid.{name}"] = float(metric(output_N, y_N))
            except Exception as error:
                if failures is None:
                    raise
                failures[lane.trial] = error
            else:
                results[lane.trial] = values
        return results

    def culprits(self) -> dict[int, Exception]:
        """Lanes whose next step raises when they are alone, with what they raise. Changes nothing."""
        found: dict[int, Exception] = {}
        program = self._make_program(SEPARATE)
        for row, lane in enumerate(self.lanes):
            alone = self._stack.select([row])
            parameters = {k: view.requires_grad_() for k, view in self.layout.views(alone.flat).items()}
            try:
                for microbatch in range(self.study.accumulate):
                    batch = make_batch(self.data, [lane.place], microbatch, self.study.accumulate)
                    program.gradients(parameters, alone.buffers, batch)
            except Exception as error:
                found[lane.trial] = error
        return found

    def set_check(self, check: Check) -> None:
        """Have another gate asked at the boundaries."""
        self.check = check
        self.program.set_check(check)

    def _gradients(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Losses (F,) and gradients (F, P), averaged over a step's microbatches, and what the buffers become."""
        num = self.study.accumulate
        places = [lane.place for lane in self.lanes]
        buffers = {name: tensor.clone() for name, tensor in self._stack.buffers.items()}
        losses_F = grad_FP = None
        for microbatch in range(num):
            self.check(sites.STEP)
            batch = make_batch(self.data, places, microbatch, num)
            self.check(sites.FORWARD)
            new_losses_F, gradients = self.program.gradients(self._parameters, buffers, batch)
            self.check(sites.FLATTEN)
            new_grad_FP = self._flatten(gradients)
            losses_F = new_losses_F if losses_F is None else losses_F + new_losses_F
            grad_FP = new_grad_FP if grad_FP is None else grad_FP.add_(new_grad_FP)
        assert losses_F is not None and grad_FP is not None
        if not self._checked_readouts:
            self._refuse_reassigned_buffers()
        if not self._checked_readouts and isinstance(self.program, (GeneralProgram, FastProgram, SeparateProgram)):
            check_readouts(self.surrogate, self.program.module)
            self._checked_readouts = True
        return (losses_F / num, grad_FP.div_(num), buffers) if num > 1 else (losses_F, grad_FP, buffers)

    def _refuse_reassigned_buffers(self) -> None:
        """A buffer that forward replaces, instead of changing it in place, would be lost.

        Raises:
            FusionError: There is one.
        """
        before = dict(self._template.named_buffers())
        if not before:
            return
        batch = make_batch(self.data, [self.lanes[0].place], 0, self.study.accumulate)
        with torch.no_grad(), torch.random.fork_rng():
            call_model(self._template.train(), batch.of_lane(0)[0])
        for name, buffer in self._template.named_buffers():
            if buffer is not before[name]:
                raise FusionError(
                    f"the model's forward assigns a new tensor to its buffer {name}, which would be lost; change it in "
                    f"place: self.{name.rpartition('.')[2]}.copy_(…)"
                )

    def _fallible(self, run: Callable[[], T]) -> T:
        """Run something of the program; where the model cannot be fused, say so and do it lane by lane."""
        try:
            return run()
        except NotFusableError as error:
            logger.warning("%s", error)
            self.refusal = error
            self.use(SEPARATE)
            return run()

    def _make_program(self, kind: str, depth: int | None = None) -> Program:
        dtype = PRECISIONS[self.study.precision]
        return make_program(kind, self.new_module, self.study.loss, self.check, dtype=dtype, depth=depth)

    def _flatten(self, gradients: Gradients) -> Tensor:
        """Gradients as (F, P); notes where parameters lie that the loss does not depend on: torch leaves them alone."""
        num_lanes = len(self.lanes)
        pieces = []
        self._unused = []
        for (name, parameter), gradient, gap in zip(self._parameters.items(), gradients, self._gaps, strict=True):
            if gradient is None:
                start = self.layout.offsets[name]
                self._unused.append(slice(start, start + self.layout.shapes[name].numel()))
                gradient = torch.zeros_like(parameter)
            pieces.append(gradient.reshape(num_lanes, -1))
            if gap is not None:
                pieces.append(gap)
        return torch.cat(pieces, dim=1)

    def _quiet_check(self) -> None:
        """A boundary inside the update: an exception waits until the update is whole."""
        if self._late is None:
            try:
                self.check(sites.UPDATE_MORE)
            except BaseException as error:
                self._late = error

    def _raise_late(self) -> None:
        if self._late is not None:
            late, self._late = self._late, None
            raise late
