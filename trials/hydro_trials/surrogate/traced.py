"""A module without a constructor in, narrower modules out.

The module runs once on example inputs, which tells the sizes that follow width. A narrower one is a copy with smaller
parameters, and with the numbers that its modules hold (channels, groups, heads, normalized shapes) replaced; that it
runs and gives outputs of the same shape is tried, never assumed. Weights are drawn anew from the values of the given
module: where init has a structure beyond its distribution, a factory is the better way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hydro_slurm.errors import SurrogateError
from hydro_trials.study_file import describe_error
from hydro_trials.surrogate.trace import Trace, module_names, trace_sizes

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_NO_WIDTH = ("kernel", "stride", "padding", "dilation", "patch", "group", "layer", "dropout", "window")


class TracedFactory:
    """`build(width)` for a module instance.

    Args:
        module: The target; it is copied, never changed.
        example: Inputs (samples, ...), two samples or more.

    Raises:
        SurrogateError: The module cannot be traced, or nothing in it can shrink.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self._module, self._example = module, example
        self._trace: Trace = trace_sizes(module, example)
        self._tried: set[int] = set()
        table = self._trace.table
        self._shrinking = {
            atom
            for name in dict(module.named_parameters())
            for size in self._trace.parameters[name]
            for atom in table.free(size)
        }
        if not self._shrinking:
            reasons = sorted(set(self._trace.reasons.values()))
            because = f" ({'; '.join(reasons[:3])})" if reasons else ": every size is an input's or an output's"
            raise SurrogateError(
                f"no size of this {type(module).__name__} can follow width{because}; give Study.build a function "
                "build(width), or use width_scale 1"
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """What kept sizes from following width, though other sizes do."""
        return tuple(
            f"{reason} is not known to the trace: sizes met there stay the target's, and the surrogate shrinks only "
            "in part; give Study.build a function build(width) to shrink them too"
            for reason in sorted(set(self._trace.reasons.values()))
        )

    def __call__(self, width: float) -> nn.Module:
        scale = 1 / width
        if math.isclose(scale, 1):
            return self._copy({})
        if not math.isclose(scale, round(scale)):
            raise SurrogateError(f"a traced module shrinks by whole numbers, got width_scale {scale:g}")
        module = self._copy(self._narrow_sizes(round(scale)))
        if round(scale) not in self._tried:
            self._try(module, round(scale))
            self._tried.add(round(scale))
        return module

    def _narrow_sizes(self, scale: int) -> dict[int, int]:
        """The smaller size of every atom that shrinks.

        Raises:
            SurrogateError: One is not divisible; the nearest scale that divides all is named.
        """
        narrow, obstacle = self._divide(scale)
        if obstacle is None:
            return narrow
        most = max(self._trace.table.values[atom] for atom in self._shrinking)
        dividing = [other for other in range(2, most + 1) if self._divide(other)[1] is None]
        nearest = min(dividing, key=lambda other: (abs(other - scale), other), default=None)
        advice = "no other does" if nearest is None else f"the nearest that does is {nearest}"
        raise SurrogateError(f"width_scale {scale} does not divide {obstacle}; {advice}")

    def _divide(self, scale: int) -> tuple[dict[int, int], str | None]:
        table = self._trace.table
        shrinking = set(self._shrinking) - table.kept
        for split in table.splits:
            first, second = table.free(((1, (split.first,)),)), table.free(((1, (split.second,)),))
            fewer = split.shrink_first
            if split.flippable:
                fewer = all(table.values[atom] % scale == 0 for atom in first)
            dropped = second if fewer else first
            if (first if fewer else second) <= table.kept or not (first if fewer else second):
                continue  # the other half is a number: only one of them can shrink
            shrinking -= dropped
        narrow = {}
        for atom in sorted(shrinking):
            size, rest = divmod(table.values[atom], scale)
            if rest:
                return {}, f"{self._where(atom)}, which has {table.values[atom]}"
            narrow[atom] = size
        return narrow, None

    def _where(self, atom: int) -> str:
        table = self._trace.table
        for split in table.splits:
            if split.first == atom:
                return f"the heads or groups of module {split.module or 'of the study'}"
        for name, sizes in self._trace.parameters.items():
            for dim, size in enumerate(sizes):
                if atom in table.free(size):
                    return f"dimension {dim} of {name}"
        return "a size"

    def _copy(self, narrow: dict[int, int]) -> nn.Module:
        """A copy of the module at these sizes, its parameters drawn anew."""
        module = copy.deepcopy(self._module)
        table = self._trace.table
        padding_rows = {
            f"{name}.weight" if name else "weight": part.padding_idx
            for name, part in module.named_modules()
            if isinstance(part, nn.Embedding) and part.padding_idx is not None
        }
        replaced: dict[int, nn.Parameter] = {}
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            owner, own_name = _owner(module, name)
            if id(parameter) not in replaced:
                shape = tuple(table.value(size, narrow) for size in self._trace.parameters[name])
                values = _draw(parameter, shape, padding_rows.get(name))
                replaced[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            owner._parameters[own_name] = replaced[id(parameter)]
        for name, buffer in list(module.named_buffers()):
            owner, own_name = _owner(module, name)
            shape = tuple(table.value(size, narrow) for size in self._trace.parameters[name])
            owner._buffers[own_name] = buffer[tuple(slice(0, n) for n in shape)].clone()
        if narrow:
            for name, part in module.named_modules():
                for attribute, value in self._numbers(name, part, narrow):
                    setattr(part, attribute, value)
        return module

    def _numbers(self, name: str, part: nn.Module, narrow: dict[int, int]) -> Iterator[tuple[str, Any]]:
        """The numbers that a module holds and their values at the smaller width."""
        table = self._trace.table
        own = {own: tuple(p.shape) for own, p in part.named_parameters(recurse=False)}
        if isinstance(part, _CONVOLUTIONS):
            groups = table.value(self._trace.groups[name], narrow) if name in self._trace.groups else part.groups
            out, into = own["weight"][:2]
            if isinstance(part, nn.modules.conv._ConvTransposeNd):
                out, into = into * groups, out // groups
            yield from (("groups", groups), ("out_channels", out), ("in_channels", into * groups))
        elif isinstance(part, nn.Linear):
            yield from (("out_features", own["weight"][0]), ("in_features", own["weight"][1]))
        elif isinstance(part, (nn.LayerNorm, nn.RMSNorm)) and own:
            yield "normalized_shape", own["weight"]
        elif isinstance(part, nn.Embedding):
            yield "embedding_dim", own["weight"][1]
        elif isinstance(part, nn.MultiheadAttention):
            width = part.out_proj.weight.shape[0]
            yield from (("embed_dim", width), ("num_heads", width // part.head_dim))
            yield "kdim", width if part.kdim == part.embed_dim else part.kdim
            yield "vdim", width if part.vdim == part.embed_dim else part.vdim
        else:
            yield from self._other_numbers(name, part, narrow)

    def _other_numbers(
        self, name: str, part: nn.Module, narrow: dict[int, int]
    ) -> Iterator[tuple[str, int | tuple[int, ...]]]:
        """Numbers of modules that are not known: those equal to a size that shrinks in the module's own operations."""
        table = self._trace.table
        met = set(self._trace.seen.get(name, ()))
        for child, _ in part.named_children():
            met |= self._trace.seen.get(f"{name}.{child}".lstrip("."), set())
        for parameter in dict(part.named_parameters(recurse=False)):
            met |= set(self._trace.parameters.get(f"{name}.{parameter}".lstrip("."), ()))
        changes: dict[int, set[int]] = {}
        for size in met:
            if table.free(size):
                changes.setdefault(table.value(size), set()).add(table.value(size, narrow))
        for attribute, value in list(vars(part).items()):
            if attribute.startswith("_") or any(word in attribute for word in _NO_WIDTH):
                continue
            if type(value) is tuple and value and all(type(n) is int for n in value):
                smaller = tuple(_only(changes.get(n, {n}), n, attribute) for n in value)
                if smaller != value:
                    yield attribute, smaller
            elif type(value) is int and value in changes:
                yield attribute, _only(changes[value], value, attribute)

    def _try(self, module: nn.Module, scale: int) -> None:
        """Run a narrow module on the example.

        Raises:
            SurrogateError: It does not run, or its outputs have another shape than the target's.
        """
        module = copy.deepcopy(module).eval()
        with torch.no_grad(), module_names(module) as names:
            try:
                output = module(self._example)
            except Exception as error:
                raise SurrogateError(
                    f"module {names[-1] or 'of the study'} cannot be shrunk by {scale}: its forward holds sizes of its "
                    f"own ({describe_error(error)}); give Study.build a function build(width), or use width_scale 1"
                ) from error
        shapes = [leaf.shape for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if shapes != self._trace.output_shapes:
            raise SurrogateError(
                f"shrunk by {scale}, the outputs have shapes {[tuple(s) for s in shapes]} instead of "
                f"{[tuple(s) for s in self._trace.output_shapes]}; give Study.build a function build(width)"
            )


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own_name = name.rpartition(".")
    return module.get_submodule(path), own_name


def _draw(parameter: Tensor, shape: tuple[int, ...], padding_row: int | None) -> Tensor:
    """New values with the distribution of the given ones; frozen parameters are cut out instead."""
    values = parameter.detach()
    if not parameter.requires_grad or values.numel() == 0:
        return values[tuple(slice(0, n) for n in shape)].clone()
    if bool((values == values.flatten()[0]).all()):
        return values.flatten()[0].expand(shape).clone()
    pool = values
    if padding_row is not None:
        pool = torch.cat([values[:padding_row], values[padding_row + 1 :]])
    drawn = pool.flatten()[torch.randint(pool.numel(), shape)]
    if padding_row is not None:
        drawn[padding_row] = values[padding_row][: shape[1]]
    return drawn


def _only(choices: set[int], value: int, attribute: str) -> int:
    """The new value of a number that may stand for several sizes: a number of heads shrinks, a size of heads stays."""
    if len(choices) == 1:
        return next(iter(choices))
    if "head" in attribute and "dim" not in attribute and "size" not in attribute:
        return min(choices)
    if "head" in attribute or "dim_head" in attribute:
        return max(choices)
    return min(choices)
