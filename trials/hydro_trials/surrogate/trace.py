"""Runs a model once and learns which dimensions of its tensors must be equal.

Every aten operation is seen as it runs, whatever Python code called it: so control flow, functional calls and several
inputs need no special care, and nothing depends on how the model's source is written. Operations that are not known
pin the dimensions that they touch, and are remembered as the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
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
from hydro_trials.surrogate.sizes import Size, SizeTable, number, plus, product, times

Sizes = tuple[Size, ...]


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
        mode = _Recorder(trace, names, dict(module.named_modules()))
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


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        rule = _RULES.get(name)
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


# Rules: (recorder, args, kwargs, outputs) -> sizes of the outputs, or None where the generic rule is to be applied.


def _mm(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    left, right = rec.of(args[0]), rec.of(args[1])
    rec.table.unify(left[-1], right[-2])
    if len(left) == 3:
        rec.table.unify(left[0], right[0])
    return [(*left[:-1], right[-1])]


def _addmm(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    sizes = _mm(rec, args[1:3], kwargs, outputs)
    for offset, size in enumerate(reversed(rec.of(args[0])), 1):
        if args[0].shape[-offset] != 1:
            rec.table.unify(size, sizes[0][-offset])
    return sizes


def _convolution(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x, weight, bias = args[:3]
    transposed, num_groups = args[6], args[8]
    channels, weights = rec.of(x)[1], rec.of(weight)
    incoming, out = (weights[0], weights[1]) if transposed else (weights[1], weights[0])
    for kernel in weights[2:]:
        rec.table.pin(kernel)
    if num_groups == 1:
        rec.table.unify(channels, incoming)
    elif transposed:
        for size in (channels, incoming, out):
            rec.give_up(size, "grouped transposed convolution")
        out = number(outputs[0].shape[1])
    elif num_groups == x.shape[1] and weight.shape[0] % num_groups == 0:
        rec.table.unify(out, times(number(weight.shape[0] // num_groups), channels))  # depthwise
        rec.trace.groups[rec.names[-1]] = channels
    else:
        one = rec.table.split(channels, num_groups, rec.names[-1], shrink_first=True, flippable=True)
        other = rec.table.split(out, num_groups, rec.names[-1], shrink_first=True, flippable=True)
        if one is not None and other is not None:
            rec.table.unify(one[0], other[0])
            rec.table.unify(one[1], incoming)
            rec.trace.groups[rec.names[-1]] = one[0]
        else:
            rec.give_up(incoming, "grouped convolution")
    if bias is not None:
        rec.table.unify(rec.of(bias)[0], out)
    return [(rec.of(x)[0], out, *(number(size) for size in outputs[0].shape[2:]))]


def _norm(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    """Batch and group norm: whatever is one-dimensional belongs to dimension 1."""
    x = rec.of(args[0])
    for tensor in args[1:5]:
        if isinstance(tensor, Tensor):
            rec.table.unify(rec.of(tensor)[0], x[1])
    return [x, *(tuple(number(n) for n in output.shape) for output in outputs[1:])]


def _layer_norm(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x = rec.of(args[0])
    for tensor in args[2:4]:
        if isinstance(tensor, Tensor):
            for size, other in zip(rec.of(tensor), x[-tensor.dim() :], strict=True):
                rec.table.unify(size, other)
    return [x, *(tuple(number(n) for n in output.shape) for output in outputs[1:])]


def _embedding(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    table, index = rec.of(args[0]), rec.of(args[1])
    rec.table.pin(table[0])
    return [(*index, table[1])]


def _permute(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x = rec.of(args[0])
    return [tuple(x[dim] for dim in args[1])]


def _transpose(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x = list(rec.of(args[0]))
    if len(x) > 1:
        one, other = args[1:3] if len(args) > 2 else (0, 1)
        x[one], x[other] = x[other], x[one]
    return [tuple(x)]


def _expand(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x, shape = rec.of(args[0]), outputs[0].shape
    padded = [number(1)] * (len(shape) - len(x)) + list(x)
    old = [1] * (len(shape) - len(x)) + list(args[0].shape)
    return [
        tuple(
            size if before == after else rec.table.fresh(after, kept=True)
            for size, before, after in zip(padded, old, shape, strict=True)
        )
    ]


def _drop_or_add_ones(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    sizes = [size for size, n in zip(rec.of(args[0]), args[0].shape, strict=True) if n != 1]
    return [tuple(number(1) if n == 1 else sizes.pop(0) for n in outputs[0].shape)]


def _view(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    """Match old and new dimensions from the left, splitting and merging where one is a multiple of the other."""
    old = [(size, n) for size, n in zip(rec.of(args[0]), args[0].shape, strict=True) if n != 1]
    result: list[Size] = []
    for wanted in outputs[0].shape:
        if wanted == 1:
            result.append(number(1))
            continue
        factors: list[Size] = []
        while wanted > 1 and old:
            size, n = old.pop(0)
            if wanted % n == 0:
                factors.append(size)
                wanted //= n
            elif n % wanted == 0:
                module = rec.modules.get(rec.names[-1])
                halves = rec.table.split(
                    size, wanted, rec.names[-1], shrink_first=_shrinks_first(module, wanted, n // wanted)
                )
                one, other = halves or (number(wanted), number(n // wanted))
                factors.append(one)
                old.insert(0, (other, n // wanted))
                wanted = 1
            else:
                for each in (*factors, size, *(s for s, _ in old)):
                    rec.give_up(each, "view")
                return [tuple(number(n) for n in outputs[0].shape)]
        result.append(product(factors))
    return [tuple(result)]


def _shrinks_first(module: nn.Module | None, first: int, second: int) -> bool:
    """Of a dimension viewed as first x second: whether the first is a number of heads, which shrinks before their size.

    A number that stands in the module as a number of heads can be made smaller there; one that is written into the
    forward pass, or a number of groups, cannot.
    """
    held = {name: value for name, value in vars(module).items() if type(value) is int} if module else {}
    if any(value == first and "head" in name and "dim" not in name for name, value in held.items()):
        return True
    if any(value == first and "group" not in name for name, value in held.items()):
        return True
    return any(value == second for value in held.values())


def _cat(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outputs[0].dim()
    tensors = [tensor for tensor in args[0] if tensor.dim() == outputs[0].dim()]
    total: Size = ()
    for tensor in tensors:
        total = plus(total, rec.of(tensor)[dim])
        for position, size in enumerate(rec.of(tensor)):
            if position != dim:
                rec.table.unify(rec.of(tensors[0])[position], size)
    sizes = list(rec.of(tensors[0]))
    sizes[dim] = total
    return [tuple(sizes)]


def _split(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
    sizes, parts = rec.of(args[0]), [output.shape[dim] for output in outputs]
    whole = rec.table.resolve(sizes[dim])
    if len(outputs) == 1:
        return [sizes]
    if len(whole) == len(parts) and [rec.table.value((term,)) for term in whole] == parts:
        pieces: list[Size] = [(term,) for term in whole]
    elif not rec.table.free(whole):
        pieces = [number(part) for part in parts]
    else:
        pieces = [rec.table.fresh(part) for part in parts]
        if len(set(parts)) == 1:
            pieces = [pieces[0]] * len(parts)
        total: Size = ()
        for piece in pieces:
            total = plus(total, piece)
        rec.table.unify(whole, total)
    return [tuple(piece if position == dim else size for position, size in enumerate(sizes)) for piece in pieces]


def _without_dim(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    """select, unbind: one dimension less."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0].dim()
    sizes = rec.of(args[0])
    rec.table.pin(sizes[dim])
    rest = tuple(size for position, size in enumerate(rec.of(args[0])) if position != dim)
    return [rest for _ in outputs]


def _stack(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outputs[0].dim()
    sizes = list(rec.broadcast(args[0]))
    sizes.insert(dim, number(len(args[0])))
    return [tuple(sizes)]


def _reduce(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x, rank = rec.of(args[0]), args[0].dim()
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        reduced = set(range(rank))
    else:
        reduced = {dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if outputs[0].dim() == rank:
        return [tuple(number(1) if dim in reduced else size for dim, size in enumerate(x)) for _ in outputs]
    return [tuple(size for dim, size in enumerate(x) if dim not in reduced) for _ in outputs]


def _attention(rec: _Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    query, key, value = (rec.of(tensor) for tensor in args[:3])
    rec.table.unify(query[-1], key[-1])
    for position in range(len(query) - 2):
        rec.table.unify(query[position], key[position])
        rec.table.unify(query[position], value[position])
    rest = [tuple(number(n) for n in output.shape) for output in outputs[1:]]
    return [(*query[:-1], value[-1]), *rest]


_RULES: dict[str, Callable[[_Recorder, tuple[Any, ...], Any, list[Tensor]], list[Sizes]]] = {
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "convolution": _convolution,
    "native_batch_norm": _norm,
    "_native_batch_norm_legit": _norm,
    "_native_batch_norm_legit_no_training": _norm,
    "native_group_norm": _norm,
    "native_layer_norm": _layer_norm,
    "embedding": _embedding,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "expand": _expand,
    "squeeze": _drop_or_add_ones,
    "unsqueeze": _drop_or_add_ones,
    "view": _view,
    "_unsafe_view": _view,
    "_reshape_alias": _view,
    "cat": _cat,
    "split": _split,
    "split_with_sizes": _split,
    "select": _without_dim,
    "unbind": _without_dim,
    "stack": _stack,
    "sum": _reduce,
    "mean": _reduce,
    "amax": _reduce,
    "amin": _reduce,
    "var": _reduce,
    "var_mean": _reduce,
    "std": _reduce,
    "logsumexp": _reduce,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
}
