"""What each operation says about the sizes of its tensors.

A rule takes the recorder, the operation's arguments and its outputs, and gives the sizes of the outputs, having unified
what must be equal. Operations without a rule are elementwise, or keep what keeps its size, or are not understood.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hydro_trials.surrogate.sizes import Size, number, plus, product, times

if TYPE_CHECKING:
    from hydro_trials.surrogate.trace import Recorder

Sizes = tuple[Size, ...]


def _mm(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    left, right = rec.of(args[0]), rec.of(args[1])
    rec.table.unify(left[-1], right[-2])
    if len(left) == 3:
        rec.table.unify(left[0], right[0])
    return [(*left[:-1], right[-1])]


def _addmm(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    sizes = _mm(rec, args[1:3], kwargs, outputs)
    for offset, size in enumerate(reversed(rec.of(args[0])), 1):
        if args[0].shape[-offset] != 1:
            rec.table.unify(size, sizes[0][-offset])
    return sizes


def _convolution(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
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


def _norm(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    """Batch and group norm: whatever is one-dimensional belongs to dimension 1."""
    x = rec.of(args[0])
    for tensor in args[1:5]:
        if isinstance(tensor, Tensor):
            rec.table.unify(rec.of(tensor)[0], x[1])
    return [x, *(tuple(number(n) for n in output.shape) for output in outputs[1:])]


def _layer_norm(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x = rec.of(args[0])
    for tensor in args[2:4]:
        if isinstance(tensor, Tensor):
            for size, other in zip(rec.of(tensor), x[-tensor.dim() :], strict=True):
                rec.table.unify(size, other)
    return [x, *(tuple(number(n) for n in output.shape) for output in outputs[1:])]


def _embedding(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    table, index = rec.of(args[0]), rec.of(args[1])
    rec.table.pin(table[0])
    return [(*index, table[1])]


def _permute(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x = rec.of(args[0])
    return [tuple(x[dim] for dim in args[1])]


def _transpose(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x = list(rec.of(args[0]))
    if len(x) > 1:
        one, other = args[1:3] if len(args) > 2 else (0, 1)
        x[one], x[other] = x[other], x[one]
    return [tuple(x)]


def _expand(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x, shape = rec.of(args[0]), outputs[0].shape
    padded = [number(1)] * (len(shape) - len(x)) + list(x)
    old = [1] * (len(shape) - len(x)) + list(args[0].shape)
    return [
        tuple(
            size if before == after else rec.table.fresh(after, kept=True)
            for size, before, after in zip(padded, old, shape, strict=True)
        )
    ]


def _drop_or_add_ones(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    sizes = [size for size, n in zip(rec.of(args[0]), args[0].shape, strict=True) if n != 1]
    return [tuple(number(1) if n == 1 else sizes.pop(0) for n in outputs[0].shape)]


def _view(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
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


def _cat(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
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


def _split(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
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


def _without_dim(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    """select, unbind: one dimension less."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0].dim()
    sizes = rec.of(args[0])
    rec.table.pin(sizes[dim])
    rest = tuple(size for position, size in enumerate(rec.of(args[0])) if position != dim)
    return [rest for _ in outputs]


def _stack(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outputs[0].dim()
    sizes = list(rec.broadcast(args[0]))
    sizes.insert(dim, number(len(args[0])))
    return [tuple(sizes)]


def _reduce(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    x, rank = rec.of(args[0]), args[0].dim()
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        reduced = set(range(rank))
    else:
        reduced = {dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if outputs[0].dim() == rank:
        return [tuple(number(1) if dim in reduced else size for dim, size in enumerate(x)) for _ in outputs]
    return [tuple(size for dim, size in enumerate(x) if dim not in reduced) for _ in outputs]


def _attention(rec: Recorder, args: tuple[Any, ...], kwargs: Any, outputs: list[Tensor]) -> list[Sizes]:
    query, key, value = (rec.of(tensor) for tensor in args[:3])
    rec.table.unify(query[-1], key[-1])
    for position in range(len(query) - 2):
        rec.table.unify(query[position], key[position])
        rec.table.unify(query[position], value[position])
    rest = [tuple(number(n) for n in output.shape) for output in outputs[1:]]
    return [(*query[:-1], value[-1]), *rest]


RULES: dict[str, Callable[[Recorder, tuple[Any, ...], Any, list[Tensor]], list[Sizes]]] = {
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
