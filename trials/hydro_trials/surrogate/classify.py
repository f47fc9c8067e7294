"""Which dimensions of a model's parameters follow its width, and what that makes of each parameter.

Only shapes at two widths decide, and the kind of module that owns a parameter: never its place in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from hydro_slurm.errors import SurrogateError
from hydro_trials.surrogate.attention import HeadFactor, head_factors

KINDS = ("input", "hidden", "output", "fixed")
"""input: only the outgoing dimension follows width (embeddings, biases and norms too); hidden: both; output: only the
incoming one; fixed: none."""

_WEIGHT_FIRST_OUT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHT_LAST_OUT = (nn.Embedding, nn.EmbeddingBag, *_TRANSPOSED)
_READOUTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class ParameterShape:
    """One parameter at both widths."""

    name: str
    kind: str
    target_shape: tuple[int, ...]
    surrogate_shape: tuple[int, ...]
    fan_in_ratio: float = 1.0
    """Target size / surrogate size of the incoming dimension; 1 where it does not follow width."""
    fan_out_ratio: float = 1.0


@dataclass(frozen=True)
class Classification:
    """Every parameter's kind, and what the forward pass needs at the surrogate's width."""

    parameters: dict[str, ParameterShape]
    readout_factors: dict[str, float]
    """Modules whose input the surrogate multiplies, with the factor."""
    heads: dict[str, HeadFactor] = field(default_factory=dict)
    """Attention modules whose head size shrinks."""

    @property
    def kinds(self) -> dict[str, str]:
        return {name: parameter.kind for name, parameter in self.parameters.items()}

    @property
    def readouts(self) -> tuple[str, ...]:
        return tuple(self.readout_factors)


def classify(
    target: nn.Module, surrogate: nn.Module, width_scale: float, overrides: Mapping[str, str] | None = None
) -> Classification:
    """Compare a model with its shrunk version, parameter by parameter.

    Args:
        target: The model at width 1.
        surrogate: The model at width 1 / `width_scale`.
        width_scale: S.
        overrides: Kinds of parameters that shapes cannot tell.

    Raises:
        SurrogateError: The two differ in more than width, a dimension grows, or a parameter's kind cannot be told.
    """
    overrides = dict(overrides or {})
    _check_same_names(target, surrogate, width_scale)
    narrow = dict(surrogate.named_parameters())
    roles = _roles_by_parameter(target)
    for name, kind in overrides.items():
        if name not in roles or kind not in KINDS:
            raise SurrogateError(
                f"parameter_kinds[{name!r}] = {kind!r}: needed a parameter of the model and one of {', '.join(KINDS)}"
            )
    parameters, readouts = {}, {}
    for name, parameter in target.named_parameters():
        wide_shape, narrow_shape = tuple(parameter.shape), tuple(narrow[name].shape)
        ratios = _ratios(name, wide_shape, narrow_shape, width_scale)
        found = {}
        for role in roles[name]:
            kind = overrides.get(name) or _kind_of(name, role, wide_shape, ratios)
            found[kind] = _fans(name, role, kind, ratios)
            if kind == "output":
                readouts[_readout_module(name, role)] = found[kind][0]
        if not set(found) <= {"input", "output"} and len(found) > 1:
            raise SurrogateError(
                f"parameter {name} is shared by modules that use it as {' and '.join(sorted(found))}: "
                "such sharing has no known rule; use separate parameters, or width_scale 1"
            )
        # A tied embedding and readout: every rule of the two kinds agrees except the readout's forward multiplier.
        kind = min(found)
        parameters[name] = ParameterShape(name, kind, wide_shape, narrow_shape, *found[kind])
    order = [name for name, _ in target.named_modules() if name in readouts]
    return Classification(parameters, {name: readouts[name] for name in order}, head_factors(target, surrogate))


@dataclass(frozen=True)
class _Role:
    """A module that holds a parameter, under which name of its own."""

    module_name: str
    module: nn.Module
    own_name: str


def _check_same_names(target: nn.Module, surrogate: nn.Module, width_scale: float) -> None:
    for what in ("parameters", "buffers"):
        wide = dict(getattr(target, f"named_{what}")(remove_duplicate=False))
        narrow = dict(getattr(surrogate, f"named_{what}")(remove_duplicate=False))
        for name in [*wide, *narrow]:
            if (name in wide) != (name in narrow):
                present, absent = ("1", f"1/{width_scale:g}") if name in wide else (f"1/{width_scale:g}", "1")
                raise SurrogateError(
                    f"{what[:-1]} {name} exists at width {present} and not at width {absent}: "
                    "build(width) must change widths only, not depth or names"
                )


def _ratios(name: str, wide: tuple[int, ...], narrow: tuple[int, ...], width_scale: float) -> dict[int, float]:
    """Target size / surrogate size of the dimensions that follow width. They need not agree: widths may be rounded."""
    if len(wide) != len(narrow):
        raise SurrogateError(f"parameter {name} has shape {wide} at width 1 and {narrow} at width 1/{width_scale:g}")
    for dim in range(len(wide)):
        if narrow[dim] > wide[dim] or narrow[dim] == 0 < wide[dim]:
            raise SurrogateError(
                f"parameter {name}: dimension {dim} is {wide[dim]} at width 1 and {narrow[dim]} at width "
                f"1/{width_scale:g}; every size must shrink with width and stay above 0, or not change"
            )
    return {dim: wide[dim] / narrow[dim] for dim in range(len(wide)) if wide[dim] != narrow[dim]}


def _roles_by_parameter(model: nn.Module) -> dict[str, list[_Role]]:
    first_names: dict[int, str] = {}
    roles: dict[str, list[_Role]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        module_name, _, own_name = name.rpartition(".")
        roles.setdefault(first, []).append(_Role(module_name, model.get_submodule(module_name), own_name))
    return roles


def _kind_of(name: str, role: _Role, shape: tuple[int, ...], ratios: Mapping[int, float]) -> str:
    infinite = tuple(ratios)
    if not infinite:
        return "fixed"
    if len(infinite) > 2:
        raise SurrogateError(
            f"parameter {name} of shape {shape}: {len(infinite)} of its dimensions follow width; "
            "name its kind in Study.parameter_kinds, or use width_scale 1"
        )
    if len(shape) == 1 or isinstance(role.module, (nn.LayerNorm, nn.RMSNorm)):
        return "input"
    fan_out = _fan_out_dim(role)
    if len(infinite) == 2:
        if isinstance(role.module, (nn.Embedding, nn.EmbeddingBag)):
            raise SurrogateError(f"parameter {name}: the number of embeddings follows width; keep it fixed")
        return "hidden"
    if fan_out is None:
        # A class token (1, 1, d) or positions (1, T, d): added to activations, there is nothing to be summed over.
        if sum(size > 1 for size in shape) == 1 or (shape[0] == 1 and infinite == (len(shape) - 1,)):
            return "input"
        raise SurrogateError(
            f"parameter {name} of shape {shape} belongs to {type(role.module).__name__}, and its shape does not tell "
            f"whether dimension {infinite[0]} is its input or its output; "
            f"set Study.parameter_kinds = {{{name!r}: 'input' or 'output'}}"
        )
    return "input" if infinite[0] == fan_out else "output"


def _fans(name: str, role: _Role, kind: str, ratios: Mapping[int, float]) -> tuple[float, float]:
    """Ratios of a parameter's incoming and outgoing dimension."""
    if kind == "fixed" or not ratios:
        return 1.0, 1.0
    if kind == "input":
        return 1.0, max(ratios.values())
    if kind == "output":
        return max(ratios.values()), 1.0
    fan_out = _fan_out_dim(role)
    if fan_out is None:
        if len(set(ratios.values())) > 1:
            raise SurrogateError(
                f"parameter {name} belongs to {type(role.module).__name__}, and its dimensions shrink by "
                f"{' and '.join(f'{ratio:.3g}' for ratio in ratios.values())}: which of them is its input cannot be "
                "told; let both shrink alike"
            )
        return next(iter(ratios.values())), next(iter(ratios.values()))
    incoming = [ratio for dim, ratio in ratios.items() if dim != fan_out]
    return (incoming[0] if incoming else 1.0), ratios.get(fan_out, 1.0)


def _fan_out_dim(role: _Role) -> int | None:
    """The outgoing dimension of a known module's weight; None where the module is not known."""
    if isinstance(role.module, _TRANSPOSED) and role.module.groups == role.module.in_channels > 1:
        return 0  # depthwise: each sum runs over the kernel alone, and the channels stand in front
    if isinstance(role.module, _WEIGHT_LAST_OUT) or type(role.module).__name__ == "Conv1D":
        return 1  # transformers' Conv1D, GPT-2's linear layer, is (in, out)
    if isinstance(role.module, _WEIGHT_FIRST_OUT) and role.own_name not in ("bias_k", "bias_v"):
        return 0
    return None


def _readout_module(name: str, role: _Role) -> str:
    if not isinstance(role.module, _READOUTS) and type(role.module).__name__ != "Conv1D":
        raise SurrogateError(
            f"parameter {name}: an output weight must belong to a module with one input "
            f"(nn.Linear, nn.Conv), but {role.module_name or 'the model'} is {type(role.module).__name__}"
        )
    return role.module_name


def parameter_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold parameters of their own, by name."""
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            yield name, module
