"""Hugging Face models: a `transformers` config in, narrower models out.

Which fields of a config are widths is discovered: each integer is doubled in turn, the model is built on the meta
device (no memory, no weights), and parameter shapes are compared. What changes shapes and is no width (vocabulary,
positions, layers, patches, experts, ...) stands in a block list, by words of its name. `transformers` itself is
imported by nobody but the user's file.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hydro_slurm.errors import SurrogateError
from hydro_trials.study import HuggingFace
from hydro_trials.study_file import describe_error

_NO_WIDTH = re.compile(
    r"vocab|position|ctx|seq|length|layer|depth|block|patch|kernel|stride|pool|image|pixel|channel|frame|expert|label|class"
    r"|bucket|bins?(_|$)|state|conv|group|type|token|window|mel|codebook|rank|interval|top_k|beam|seed|distance|dilation"
    r"|_id$|chunk|version|^pretraining_tp$"
)
"""Words in the names of fields that change shapes, but whose meaning is not a width."""
_HEADS = re.compile(r"(^|_)heads?$")
_HEAD_SIZE = re.compile(r"head_dim|head_size|d_head|^d_kv$")
_ROTARY = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_emb_base")
"""Fields of which a config with rotary positions has one."""
_KEPT_SIZE = ("model_dim", "d_model")
"""An attribute from which a forward pass computes a constant factor, and its field in the config (T5 divides the input
of a tied readout by sqrt(model_dim)): the surrogate keeps the target's, or its readout would be scaled twice."""


class HuggingFaceFactory:
    """`build(width)` for a model that is described by its config.

    Args:
        description: Config and model class of the target.

    Raises:
        SurrogateError: The model cannot be built from the config.
    """

    def __init__(self, description: HuggingFace) -> None:
        self._description = description
        self._wide = self._shapes(description.config)
        self.heads: dict[str, int] = {}
        self.head_sizes: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        for name, size in vars(description.config).items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 2:
                continue
            if _HEADS.search(name):
                self.heads[name] = size
            elif not _NO_WIDTH.search(name) and self._follows(name, size):
                (self.head_sizes if _HEAD_SIZE.search(name) else self.widths)[name] = size

    def __call__(self, width: float) -> nn.Module:
        scale = 1 / width
        config = self.config(round(scale) if math.isclose(scale, round(scale)) else scale)
        model = self._construct(config)
        kept = getattr(self._description.config, _KEPT_SIZE[1], None)
        for module in model.modules() if kept is not None else ():
            if isinstance(getattr(module, _KEPT_SIZE[0], None), int):
                setattr(module, _KEPT_SIZE[0], kept)
        return _Called(model, self._description.call)

    def config(self, scale: float) -> Any:
        """The config of the surrogate of width scale `scale`: fewer heads first, smaller heads after that.

        Raises:
            SurrogateError: The scale does not divide every width; the nearest that does is named.
        """
        config = copy.deepcopy(self._description.config)
        if scale == 1:
            return config
        obstacle = self._obstacle(scale)
        if obstacle is not None:
            largest = max([2, *self.widths.values()])
            dividing = [other for other in range(2, largest + 1) if self._obstacle(other) is None]
            nearest = min(dividing, key=lambda other: (abs(other - scale), other), default=None)
            advice = "no other does" if nearest is None else f"the nearest that does is {nearest}"
            raise SurrogateError(f"width_scale {scale:g} does not divide {obstacle}; {advice}")
        fewer, smaller = self._split(scale)
        for names, divisor in ((self.widths, scale), (self.heads, fewer), (self.head_sizes, smaller)):
            for name, size in names.items():
                setattr(config, name, round(size / divisor))
        return config

    def _split(self, scale: float) -> tuple[float, float]:
        """How a scale is divided between the number of heads and their size."""
        if all((size / scale).is_integer() for size in self.heads.values()):
            return scale, 1
        fewer = math.gcd(int(scale), *self.heads.values()) if float(scale).is_integer() else 1
        return fewer, scale / fewer

    def _obstacle(self, scale: float) -> str | None:
        """The first field that a scale does not divide, with its value."""
        fewer, smaller = self._split(scale)
        sizes = {name: (size, scale) for name, size in self.widths.items()}
        sizes |= {name: (size, smaller) for name, size in self.head_sizes.items()}
        for name, (size, divisor) in sizes.items():
            if not (size / divisor).is_integer():
                return f"{name} = {size}"
        if self.heads and not self.head_sizes and self.widths:
            hidden_name, hidden = next(iter(self.widths.items()))
            heads_name, heads = next(iter(self.heads.items()))
            if not (hidden / scale / (heads / fewer)).is_integer():
                return f"the head size {hidden_name} / {heads_name} = {hidden / heads:g}"
        return self._rotary_obstacle(smaller)

    def _rotary_obstacle(self, divisor: float) -> str | None:
        """The head size where rotary positions, which turn pairs of its elements, would find an odd one."""
        config = self._description.config
        if all(getattr(config, name, None) is None for name in _ROTARY) or not self.heads:
            return None
        sizes = dict(self.head_sizes)
        if not sizes and self.widths:
            hidden_name, hidden = next(iter(self.widths.items()))
            heads_name, heads = next(iter(self.heads.items()))
            sizes = {f"{hidden_name} / {heads_name}": hidden // heads}
        odd = (name for name, size in sizes.items() if round(size / divisor) % 2)
        name = next(odd, None)
        return None if name is None else f"the head size {name} = {sizes[name]} into an even one (rotary positions)"

    def _follows(self, name: str, size: int) -> bool:
        """Whether shapes follow a field: same parameters, some of another shape."""
        config = copy.deepcopy(self._description.config)
        try:
            setattr(config, name, 2 * size)
            shapes = self._shapes(config)
        except Exception:  # whatever a model's constructor raises for a value that makes no sense
            return False
        return shapes.keys() == self._wide.keys() and shapes != self._wide

    def _shapes(self, config: Any) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: parameter.shape for name, parameter in self._construct(config).named_parameters()}

    def _construct(self, config: Any) -> nn.Module:
        model_class = self._description.model_class
        config = copy.deepcopy(config)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # its cache objects are no tensors, and training has no use for them
        # Fused attention has no batching rule for vmap on CPUs: it runs lane by lane, with a learned bias not at all.
        config._attn_implementation = "eager"
        try:
            make = getattr(model_class, "from_config", None) or model_class
            model: nn.Module = make(config)
        except Exception as error:
            raise SurrogateError(
                f"{getattr(model_class, '__name__', model_class)} cannot be built from this config: "
                f"{describe_error(error)}"
            ) from error
        return model


class _Called(nn.Module):
    """A model whose output is one tensor."""

    def __init__(self, model: nn.Module, call: Callable[[Any, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, inputs: Tensor) -> Tensor:
        if self._call is not None:
            return self._call(self.model, inputs)
        logits: Tensor = self.model(inputs).logits
        return logits
