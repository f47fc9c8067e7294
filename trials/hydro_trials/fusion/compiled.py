"""The fused step as the compiler makes it: for GPUs, and kept only where it measures faster after its compile time.

A compiled region is one quantum: the gate is asked before the forward and before the backward, never within.

Shape suffixes: F = lanes, N = samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn, vmap
from torch.func import functional_call

from hydro_slurm.errors import FusionError, HydroError
from hydro_trials.fusion import sites
from hydro_trials.fusion.batch import LaneBatch
from hydro_trials.fusion.fast import FastProgram
from hydro_trials.fusion.general import GeneralProgram
from hydro_trials.fusion.program import COMPILED, Check, Gradients, Loss, Program, check_scalar, lower_precision
from hydro_trials.samples import Tree, call_model

State = dict[str, Tensor]

T = TypeVar("T")

_DRAWS = "the model or its loss draws random numbers, which compiled lanes cannot have for themselves"


class CompiledProgram:
    """A model's forward and backward over lanes, compiled; evaluation is not.

    What is compiled is the fast path, or the general one where the model has no fast path.

    Args:
        module: One lane's model.
        loss: The study's loss.
        check: Called before forward, before backward, and in evaluation.
        dtype: What to compute in, if not in the parameters' own type.
        backend: Of torch.compile.

    Raises:
        FusionError: The model draws random numbers.
    """

    kind = COMPILED

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        check: Check,
        *,
        dtype: torch.dtype | None = None,
        backend: str = "inductor",
    ) -> None:
        self.module, self.loss, self._check, self._dtype = module, loss, check, dtype
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._plain: Program
        losses: Callable[..., Tensor]
        try:
            fast = FastProgram(module, loss, check, dtype=dtype, depth=0)
            self._plain, losses = fast, fast.undrawn_losses
        except FusionError:
            self._plain, losses = GeneralProgram(module, loss, check, dtype=dtype, depth=0), self._vmapped
        else:
            if fast.draws:
                raise FusionError(_DRAWS)
        self._losses = torch.compile(losses, backend=backend, fullgraph=True, dynamic=False)

    def set_check(self, check: Check) -> None:
        """Have another gate asked."""
        self._check = check
        self._plain.set_check(check)

    def gradients(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: LaneBatch
    ) -> tuple[Tensor, Gradients]:
        """See `Program`. The first call, and each with other shapes, compiles.

        Raises:
            FusionError: The compiler fails; the model or its loss draws random numbers, which lanes do not have for
                themselves in compiled code; or the lanes have different batch sizes.
        """
        if batch.weights_FB is not None:
            raise FusionError("lanes of different batch sizes are not compiled; run them by another kind of program")
        self.module.train()
        state = (dict(parameters), dict(buffers), batch.x, batch.y, batch.shared, batch.num_lanes)
        losses_F = _compiled(lambda: self._losses(*state))
        self._check(sites.BACKWARD)
        leaves = list(parameters.values())
        gradients = _compiled(lambda: torch.autograd.grad(losses_F.sum(), leaves, allow_unused=True))
        return losses_F.detach(), gradients

    def outputs(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x_N: Tree,
        chunk: int,
        seeds: tuple[int, ...],
    ) -> Tree:
        """See `Program`."""
        return self._plain.outputs(parameters, buffers, x_N, chunk, seeds)

    def _vmapped(self, parameters: State, buffers: State, x: Tree, y: Tree, shared: bool, num_lanes: int) -> Tensor:
        def lane_loss(parameters: State, buffers: State, x_B: Tree, y_B: Tree) -> Tensor:
            state = {**parameters, **buffers}

            def model(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.module, state, args, kwargs)

            return check_scalar(self.loss(call_model(model, x_B), y_B))

        samples = None if shared else 0
        with lower_precision(self._dtype, self._device.type):
            losses_F: Tensor = vmap(lane_loss, in_dims=(0, 0, samples, samples))(parameters, buffers, x, y)
        return losses_F


def _compiled(run: Callable[[], T]) -> T:
    """Run what compiles itself when it is first run."""
    try:
        return run()
    except (HydroError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the compiler's have no public common type
        if "called random operation" in str(error):
            raise FusionError(_DRAWS) from error
        reason = " ".join(str(error).split())[:300]
        raise FusionError(f"the fused step cannot be compiled ({type(error).__name__}: {reason})") from error
