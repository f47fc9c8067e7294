"""Records what every module of a model puts out, and the scores of every attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from hydro_trials.fusion import LaneState
from hydro_trials.samples import call_model

SCORES = "attention scores"
INPUT = "input"
OWN = "own weights"
"""What stands in parentheses behind a module's name where it is not its output."""
_MASKED = -1e4
"""Scores below are masked."""


class OutputRecorder:
    """Runs one lane's parameters through a model and keeps every output.

    Args:
        module: The model; hooks are put on it.
        readouts: Names of its readouts.
    """

    def __init__(self, module: nn.Module, readouts: tuple[str, ...]) -> None:
        self._direct = {name: _without_hooks(module.get_submodule(name)) for name in readouts}
        self._module = module.eval()
        self._outputs: dict[str, Tensor] = {}
        self._made: list[Tensor] = []
        self._stack: list[str] = []
        self._first_names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._inputs: dict[str, Tensor] = {}
        self.head_sizes: dict[str, int] = {}
        """Of what the scores of each attention are sums."""
        self.readouts: set[str] = set(readouts)
        """Readouts, and every module around one: what they put out includes it."""
        for name, part in module.named_modules():
            if isinstance(part, nn.modules.batchnorm._NormBase):
                # Running statistics follow the weights with a delay, and in directions that no gradient chose: with
                # them, the readout's change falls with width though nothing is wrong.
                part.train()
            part.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name))
            part.register_forward_hook(self._after)
            if any(readout == name or readout.startswith(f"{name}.") or not name for readout in readouts):
                self.readouts.add(name or "(model)")

    def outputs(self, state: LaneState, x_B: Tensor) -> dict[str, Tensor]:
        """Outputs by module name in the order in which they were computed, for one lane."""
        self._outputs, self._stack, self._made = {}, [], []
        with torch.no_grad(), _Scores(self):
            tensors = {**state.parameters, **state.buffers}
            call_model(lambda *args, **kwargs: functional_call(self._module, tensors, args, kwargs), x_B)
        return self._outputs

    @property
    def readout_inputs(self) -> dict[str, Tensor]:
        """What went into the readouts in the last run."""
        return dict(self._inputs)

    @torch.no_grad()
    def own_changes(self, before: LaneState, after: LaneState, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the readouts' own weights have changed of their outputs, for the inputs of an earlier run.

        The rest of a readout's change comes through its random initial weights from what lies in front of it. That part
        falls with width while widths are small, and would hide a wrong factor of the readout.
        """
        changes = {}
        for name, direct in self._direct.items():
            part = self._module.get_submodule(name)
            names = {own: self._first_names[id(p)] for own, p in part.named_parameters(recurse=False)}
            old, new = (
                functional_call(direct, {own: state.parameters[n] for own, n in names.items()}, (inputs[name],))
                for state in (before, after)
            )
            changes[name] = new - old
        return changes

    def record(self, name: str, output: Tensor) -> str:
        """Keep one output and return its key; further calls of the same module get numbers."""
        key, number = name, 2
        while key in self._outputs:
            key, number = f"{name} #{number}", number + 1
        self._outputs[key] = output.detach().clone()
        return key

    def record_scores(self, scores: Tensor, head_size: int | None) -> None:
        """Keep attention scores of the module that is running."""
        kept = torch.where(scores > _MASKED, scores, torch.zeros_like(scores))
        key = self.record(f"{self._stack[-1] if self._stack and self._stack[-1] else '(model)'} ({SCORES})", kept)
        if head_size is not None:
            self.head_sizes[key] = head_size

    @staticmethod
    def size(tensor: Tensor) -> float:
        """Mean absolute value."""
        return float(tensor.abs().mean(dtype=torch.float64)) if tensor.numel() else 0.0

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._stack.pop()
        if name in self._direct:
            self._inputs[name] = args[0].detach().clone()
        elif name and self._outputs and args and self._is_new(args[0]):  # a sum or product that no module made
            self.record(f"{name} ({INPUT})", args[0])
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        if self._is_new(output):  # a container's output is its last child's: once is enough
            self.record(name or "(model)", output)

    def _is_new(self, tensor: Any) -> bool:
        """Whether this run has not come across a tensor of activations before; it has now."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or any(tensor is t for t in self._made):
            return False
        self._made.append(tensor)
        return True


def _without_hooks(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    return module


class _Scores(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees attention as it runs, fused or written out."""

    def __init__(self, recorder: OutputRecorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        self._product: tuple[int, int] | None = None
        """Of the last batched matrix product: number of results, length of the sums."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_softmax", "_safe_softmax"):
            fitting = self._product is not None and self._product[0] == args[0].numel()
            self._recorder.record_scores(args[0], self._product[1] if self._product and fitting else None)
        elif name in ("bmm", "baddbmm"):
            left, right = args[-2:]
            self._product = (left.shape[0] * left.shape[1] * right.shape[2], left.shape[2])
        elif name.startswith("_scaled_dot_product") and "backward" not in name and isinstance(args[0], Tensor):
            query, key = args[0], args[1]
            if query.dim() == 4 and query.shape[1] != key.shape[1]:
                key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scale = (kwargs or {}).get("scale")
            scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
            self._recorder.record_scores(scores, query.shape[-1])
        return func(*args, **(kwargs or {}))
