"""Runs a model once and learns which dimensions of its tensors must be equal.

Every aten operation is seen as it runs, whatever Python code called it: so control flow, functional calls and several
inputs need no special care, and nothing depends on how the model's source is written. Operations that are not known
pin the dimensions that they touch, and are remembered as the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hydro_slurm.errors import SurrogateError
from hydro_trials.study_file import describe_error
from hydro_trials.surrogate.sizes import Size, SizeTable, number
from hydro_trials.surrogate.trace_rules import RULES, Sizes


@dataclass
class Trace:
    """What was learned."""

    table: SizeTable
    parameters: dict[str, Sizes]
    """Sizes of every parameter and buffer, by name."""
    seen: dict[str, set[Size]] = field(default_factory=dict)
    """Sizes that each module's own operations met."""
    groups: dict[str, Size] = field(default_factory=dict)
    """Number of groups of each grouped convolution."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Why atoms were pinned by an operation that is not understood."""
    output_shapes: list[torch.Size] = field(default_factory=list)


def trace_sizes(module: nn.Module, example: Tensor) -> Trace:
    """Run `module` (left as it is) on example inputs and learn its sizes. Inputs and outputs are numbers.

    Raises:
        SurrogateError: It does not run on these inputs.
    """
    module = copy.deepcopy(module).eval()
    table = SizeTable()
    trace = Trace(table, {})
    with torch.inference_mode(), _no_fast_path(), module_names(module) as names:
        tensors = {name: tensor.detach().clone() for name, tensor in _named_tensors(module)}
        mode = Recorder(trace, names, dict(module.named_modules()))
        for name, tensor in tensors.items():
            trace.parameters[name] = mode.sizes[id(tensor)] = tuple(table.fresh(size) for size in tensor.shape)
            mode.alive.append(tensor)
        inputs = example.clone()
        mode.sizes[id(inputs)] = tuple(number(size) for size in inputs.shape)
        mode.alive.append(inputs)
        try:
            with mode:
                output = functional_call(module, tensors, (inputs,))
        except Exception as error:
            raise SurrogateError(
                f"module {names[-1] or 'of the study'} cannot be traced: {describe_error(error)}; give Study.build a "
                "function build(width)"
            ) from error
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                trace.output_shapes.append(leaf.shape)
                for size in mode.of(leaf):
                    table.pin(size)
        for name, tensor in tensors.items():
            if id(tensor) not in mode.used:
                for size in trace.parameters[name]:
                    table.pin(size)
    return trace


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


@contextmanager
def _no_fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def module_names(module: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward is running, the innermost last."""
    names = [""]

    def leave(*_: Any) -> None:
        names.pop()

    for name, part in module.named_modules():
        part.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        part.register_forward_hook(leave)
    yield names


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rule of every operation to the sizes of its tensors."""

    def __init__(self, trace: Trace, names: list[str], modules: dict[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.table, self.names = trace, trace.table, names
        self.modules = modules
        self.sizes: dict[int, Sizes] = {}
        self.alive: list[Tensor] = []
        self.used: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def of(self, tensor: Tensor) -> Sizes:
        """The sizes of a tensor; those of one made inside the model are unknown, and never shrink of their own."""
        found = self.sizes.get(id(tensor))
        if found is None or len(found) != tensor.dim():
            found = tuple(self.table.fresh(size, kept=True) for size in tensor.shape)
            self._set(tensor, found)
        return found

    def _set(self, tensor: Tensor, sizes: Sequence[Size]) -> None:
        self.sizes[id(tensor)] = tuple(sizes)
        self.alive.append(tensor)  # its id must not be given to another one

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.used.update(id(tensor) for tensor in inputs)
        name = func.overloadpacket.__name__
        rule = RULES.get(name)
        before = {id(tensor) for tensor in inputs}
        found = rule(self, args, kwargs, outputs) if rule is not None else None
        if found is None:
            found = self._generic(name, inputs, outputs)
        for tensor, sizes in zip(outputs, found, strict=False):
            if id(tensor) not in before:
                self._set(tensor, sizes)
        seen = self.trace.seen.setdefault(self.names[-1], set())
        for tensor in (*inputs, *outputs):
            seen.update(self.of(tensor))

    def _generic(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> list[Sizes]:
        """Operations that work elementwise with broadcasting, or keep the dimensions that keep their size."""
        if not inputs:
            return [self.of(output) for output in outputs]
        try:
            broadcast = torch.broadcast_shapes(*(tensor.shape for tensor in inputs))  # type: ignore[no-untyped-call]
        except RuntimeError:
            broadcast = None
        found = []
        for output in outputs:
            if broadcast is not None and output.shape == broadcast:
                found.append(self.broadcast(inputs))
            elif len(inputs) == 1 and output.dim() == inputs[0].dim():
                found.append(self.same_where_equal(name, inputs[0], output))
            else:
                for tensor in inputs:
                    for size in self.of(tensor):
                        self.give_up(size, name)
                found.append(tuple(number(size) for size in output.shape))
        return found

    def broadcast(self, tensors: Sequence[Tensor]) -> Sizes:
        """Unify the dimensions of tensors aligned at their ends."""
        rank = max(tensor.dim() for tensor in tensors)
        result: list[Size] = [number(1)] * rank
        for tensor in tensors:
            for offset, size in enumerate(reversed(self.of(tensor)), 1):
                if tensor.shape[-offset] == 1:
                    continue
                if result[-offset] == number(1):
                    result[-offset] = size
                else:
                    self.table.unify(result[-offset], size)
        return tuple(result)

    def same_where_equal(self, name: str, tensor: Tensor, output: Tensor) -> Sizes:
        result = []
        for size, before, after in zip(self.of(tensor), tensor.shape, output.shape, strict=True):
            if before != after and after != 1:
                self.give_up(size, name)
            result.append(size if before == after else number(after))
        return tuple(result)

    def give_up(self, size: Size, name: str) -> None:
        where = self.names[-1] or "the model"
        for atom in self.table.free(size):
            self.trace.reasons.setdefault(atom, f"operation {name} in module {where}")
        self.table.pin(size)
