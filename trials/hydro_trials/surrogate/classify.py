"""Which dimensions of a model's parameters follow its width, and what that makes of each parameter.

Only shapes at two widths decide, and the kind of module that owns a parameter: never its place in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from hydro_slurm.errors import SurrogateError

KINDS = ("input", "hidden", "output", "fixed")
"""input: only the outgoing dimension follows width (embeddings, biases and norms too); hidden: both; output: only the
incoming one; fixed: none."""


@dataclass(frozen=True)
class ParameterShape:
    """One parameter at both widths."""

    name: str
    kind: str
    target_shape: tuple[int, ...]
    surrogate_shape: tuple[int, ...]


@dataclass(frozen=True)
class Classification:
    """Every parameter's kind, and the modules whose input the surrogate multiplies by S."""

    parameters: dict[str, ParameterShape]
    readouts: tuple[str, ...]

    @property
    def kinds(self) -> dict[str, str]:
        return {name: parameter.kind for name, parameter in self.parameters.items()}


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
        SurrogateError: The two differ in more than width, a dimension is not exactly S times smaller, or a
            parameter's kind cannot be told.
    """
    overrides = dict(overrides or {})
    _check_same_names(target, surrogate, width_scale)
    _check_attention(target, surrogate)
    narrow = dict(surrogate.named_parameters())
    roles = _roles_by_parameter(target)
    for name, kind in overrides.items():
        if name not in roles or kind not in KINDS:
            raise SurrogateError(
                f"parameter_kinds[{name!r}] = {kind!r}: needed a parameter of the model and one of {', '.join(KINDS)}"
            )
    parameters = {}
    for name, parameter in target.named_parameters():
        wide_shape, narrow_shape = tuple(parameter.shape), tuple(narrow[name].shape)
        infinite = _infinite_dims(name, wide_shape, narrow_shape, width_scale)
        kinds = {
            overrides.get(name) or _kind_of(name, module, own_name, wide_shape, infinite)
            for module, own_name in roles[name]
        }
        if not kinds <= {"input", "output"} and len(kinds) > 1:
            raise SurrogateError(
                f"parameter {name} is shared by modules that use it as {' and '.join(sorted(kinds))}: "
                "such sharing has no known rule; use separate parameters, or width_scale 1"
            )
        # A tied embedding and readout: every rule of the two kinds agrees except the readout's forward multiplier.
        parameters[name] = ParameterShape(name, min(kinds), wide_shape, narrow_shape)
    readouts = tuple(_readout_modules(target, surrogate, overrides))
    return Classification(parameters, readouts)


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


def _check_attention(target: nn.Module, surrogate: nn.Module) -> None:
    narrow = dict(surrogate.named_modules())
    for name, module in target.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            other = narrow[name]
            assert isinstance(other, nn.MultiheadAttention)
            if module.head_dim != other.head_dim:
                raise SurrogateError(
                    f"module {name}: its head size shrinks from {module.head_dim} to {other.head_dim}; "
                    "let build(width) shrink the number of heads and keep their size"
                )


def _infinite_dims(name: str, wide: tuple[int, ...], narrow: tuple[int, ...], width_scale: float) -> tuple[int, ...]:
    if len(wide) != len(narrow):
        raise SurrogateError(f"parameter {name} has shape {wide} at width 1 and {narrow} at width 1/{width_scale:g}")
    infinite = tuple(dim for dim in range(len(wide)) if wide[dim] != narrow[dim])
    for dim in infinite:
        if wide[dim] != narrow[dim] * width_scale:
            raise SurrogateError(
                f"parameter {name}: dimension {dim} shrinks from {wide[dim]} to {narrow[dim]}, which is not "
                f"{width_scale:g} times smaller; choose a width_scale that divides {wide[dim]}, and let every width "
                "in build(width) be proportional to width"
            )
    return infinite


def _roles_by_parameter(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    first_names: dict[int, str] = {}
    roles: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        module_name, _, own_name = name.rpartition(".")
        roles.setdefault(first, []).append((model.get_submodule(module_name), own_name))
    return roles


def _kind_of(name: str, module: nn.Module, own_name: str, shape: tuple[int, ...], infinite: tuple[int, ...]) -> str:
    if not infinite:
        return "fixed"
    if len(infinite) > 2:
        raise SurrogateError(
            f"parameter {name} of shape {shape}: {len(infinite)} of its dimensions follow width; "
            "name its kind in Study.parameter_kinds, or use width_scale 1"
        )
    if len(shape) == 1 or isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return "input"
    fan_out = _fan_out_dim(module, own_name)
    if len(infinite) == 2:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise SurrogateError(f"parameter {name}: the number of embeddings follows width; keep it fixed")
        return "hidden"
    if fan_out is None:
        if sum(size > 1 for size in shape) == 1:
            return "input"  # like a class token of shape (1, 1, d): there is nothing else to be summed over
        raise SurrogateError(
            f"parameter {name} of shape {shape} belongs to {type(module).__name__}, and its shape does not tell "
            f"whether dimension {infinite[0]} is its input or its output; "
            f"set Study.parameter_kinds = {{{name!r}: 'input' or 'output'}}"
        )
    return "input" if infinite[0] == fan_out else "output"


def _fan_out_dim(module: nn.Module, own_name: str) -> int | None:
    """The outgoing dimension of a known module's weight; None where the module is not known."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 1
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return 1
    known = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    if isinstance(module, known) and own_name not in ("bias_k", "bias_v"):
        return 0
    return None


def _readout_modules(target: nn.Module, surrogate: nn.Module, overrides: Mapping[str, str]) -> Iterator[str]:
    """Modules whose weight is used as an output weight, tied ones included: their input is multiplied by S."""
    first_names = {id(parameter): name for name, parameter in target.named_parameters()}
    for module_name, module in target.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            wide_shape = tuple(parameter.shape)
            narrow_shape = tuple(surrogate.get_submodule(module_name).get_parameter(own_name).shape)
            infinite = tuple(d for d in range(len(wide_shape)) if wide_shape[d] != narrow_shape[d])
            name = first_names[id(parameter)]
            kind = overrides.get(name) or _kind_of(name, module, own_name, wide_shape, infinite)
            if kind == "output":
                if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    raise SurrogateError(
                        f"parameter {name}: an output weight must belong to a module with one input "
                        f"(nn.Linear, nn.Conv), but {module_name or 'the model'} is {type(module).__name__}"
                    )
                yield module_name
