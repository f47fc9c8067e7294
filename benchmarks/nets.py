"""Well-known architectures with a `width` that multiplies every hidden width, and nothing else.

Input, output and class counts, depth, kernels and head size stay. Weights are drawn as torch's modules draw them, if a
class does not say otherwise. All can be traced by torch.fx.

Shape suffixes: B = samples, T = tokens, D = model width, H = heads, K = size of a head, V = vocabulary.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def scaled(size: int, width: float) -> int:
    """A hidden width; the surrogate refuses those that do not divide."""
    return max(1, round(size * width))


class Mlp(nn.Sequential):
    """Two hidden layers of 128."""

    def __init__(self, width: float = 1.0, *, num_inputs: int = 64, num_classes: int = 10) -> None:
        hidden = scaled(128, width)
        super().__init__(
            nn.Linear(num_inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )


def _conv_norm(num_in: int, num_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(num_in, num_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(num_out)]


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), with a projection where the shape changes."""

    def __init__(self, body: list[nn.Module], num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        projected = stride != 1 or num_in != num_out
        self.shortcut = nn.Sequential(*_conv_norm(num_in, num_out, 1, stride)) if projected else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, channels, height, width)."""
        return F.relu(self.body(x) + self.shortcut(x))


def _basic_block(num_in: int, num_out: int, stride: int) -> Residual:
    body = [*_conv_norm(num_in, num_out, 3, stride), nn.ReLU(), *_conv_norm(num_out, num_out, 3)]
    return Residual(body, num_in, num_out, stride)


def _bottleneck(num_in: int, inner: int, num_out: int, stride: int) -> Residual:
    body = [
        *_conv_norm(num_in, inner, 1),
        nn.ReLU(),
        *_conv_norm(inner, inner, 3, stride),
        nn.ReLU(),
        *_conv_norm(inner, num_out, 1),
    ]
    return Residual(body, num_in, num_out, stride)


def _pooled_head(num_features: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_features, num_classes)]


class ResNet18(nn.Sequential):
    """ResNet-18 with the stem for small images: one 3x3 convolution, no pooling.

    Source: He et al. (2016); the stem as in section 4.2 there.
    """

    def __init__(self, width: float = 1.0, *, num_classes: int = 10) -> None:
        sizes = [scaled(size, width) for size in (64, 64, 128, 256, 512)]
        layers: list[nn.Module] = [*_conv_norm(3, sizes[0], 3), nn.ReLU()]
        for stage, (num_in, num_out) in enumerate(itertools.pairwise(sizes)):
            layers += [_basic_block(num_in, num_out, 1 if stage == 0 else 2), _basic_block(num_out, num_out, 1)]
        super().__init__(*layers, *_pooled_head(sizes[-1], num_classes))


class Vgg11(nn.Sequential):
    """VGG-11 with BatchNorm and one linear head, as usual for small images (five poolings: 32 x 32 at least).

    Source: Simonyan and Zisserman (2015), configuration A.
    """

    def __init__(self, width: float = 1.0, *, num_classes: int = 10) -> None:
        layers: list[nn.Module] = []
        num_in = 3
        for size in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
            if size == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            num_out = scaled(size, width)
            layers += [nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU()]
            num_in = num_out
        super().__init__(*layers, *_pooled_head(num_in, num_classes))


class WideResNet50(nn.Sequential):
    """WideResNet-50-2: ResNet-50 with bottlenecks twice as wide, and the stem for large images.

    Source: Zagoruyko and Komodakis (2016), as torchvision's `wide_resnet50_2`.
    """

    def __init__(self, width: float = 1.0, *, num_classes: int = 10) -> None:
        num_in = scaled(64, width)
        layers: list[nn.Module] = [*_conv_norm(3, num_in, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        for stage, num_blocks in enumerate((3, 4, 6, 3)):
            inner, num_out = scaled(128 << stage, width), scaled(256 << stage, width)
            for block in range(num_blocks):
                layers.append(_bottleneck(num_in, inner, num_out, 2 if stage > 0 and block == 0 else 1))
                num_in = num_out
        super().__init__(*layers, *_pooled_head(num_in, num_classes))


class SqueezeExcitation(nn.Module):
    """Scales channels by what a small net makes of their means."""

    def __init__(self, num_channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(num_channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, num_channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, channels, height, width)."""
        return x * self.gate(x)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-excitation, projection; added to the input where the shape stays."""

    def __init__(
        self,
        num_in: int,
        inner: int,
        num_out: int,
        *,
        kernel: int,
        stride: int,
        squeezed: int,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        layers = [*_conv_norm(num_in, inner, 1), activation()] if inner != num_in else []
        layers += [*_conv_norm(inner, inner, kernel, stride, groups=inner), activation()]
        if squeezed:
            layers.append(SqueezeExcitation(inner, squeezed))
        self.body = nn.Sequential(*layers, *_conv_norm(inner, num_out, 1))
        self.is_residual = stride == 1 and num_in == num_out

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, channels, height, width)."""
        return x + self.body(x) if self.is_residual else self.body(x)


class MobileNetV3(nn.Sequential):
    """MobileNetV3-Large, without the dropout before its last layer. All widths are multiples of 8, not of 16.

    Source: Howard et al. (2019), table 1; squeezed widths as in torchvision.
    """

    BLOCKS = (
        # kernel, expanded, out, squeezed, hardswish, stride
        (3, 16, 16, 0, False, 1),
        (3, 64, 24, 0, False, 2),
        (3, 72, 24, 0, False, 1),
        (5, 72, 40, 24, False, 2),
        (5, 120, 40, 32, False, 1),
        (5, 120, 40, 32, False, 1),
        (3, 240, 80, 0, True, 2),
        (3, 200, 80, 0, True, 1),
        (3, 184, 80, 0, True, 1),
        (3, 184, 80, 0, True, 1),
        (3, 480, 112, 120, True, 1),
        (3, 672, 112, 168, True, 1),
        (5, 672, 160, 168, True, 2),
        (5, 960, 160, 240, True, 1),
        (5, 960, 160, 240, True, 1),
    )

    def __init__(self, width: float = 1.0, *, num_classes: int = 10) -> None:
        num_in = scaled(16, width)
        layers: list[nn.Module] = [*_conv_norm(3, num_in, 3, 2), nn.Hardswish()]
        for kernel, expanded, out, squeezed, is_hardswish, stride in self.BLOCKS:
            block = InvertedResidual(
                num_in,
                scaled(expanded, width),
                scaled(out, width),
                kernel=kernel,
                stride=stride,
                squeezed=scaled(squeezed, width) if squeezed else 0,
                activation=nn.Hardswish if is_hardswish else nn.ReLU,
            )
            layers.append(block)
            num_in = scaled(out, width)
        last, hidden = scaled(960, width), scaled(1280, width)
        layers += [*_conv_norm(num_in, last, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(last, hidden), nn.Hardswish(), nn.Linear(hidden, num_classes))


class CausalAttention(nn.Module):
    """Self-attention over earlier tokens; heads of a fixed size, their number follows the width."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.out = nn.Linear(size, size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Shape (B, T, D)."""
        q_BHTK, k_BHTK, v_BHTK = (
            part(x_BTD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.out(mixed_BHTK.transpose(1, 2).flatten(2))


class GptBlock(nn.Module):
    """Attention and a feed-forward net, each behind a norm and added to its input."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(size), CausalAttention(size, head_size)
        self.feed_norm = nn.LayerNorm(size)
        self.feed = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Shape (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.feed(self.feed_norm(x_BTD))


class Gpt(nn.Module):
    """A decoder on bytes: 4 blocks of width 512, 16 heads of 32, learned positions, and a head of its own (untied).

    Weights are drawn with standard deviation 0.02, biases are 0.

    Source: Radford et al. (2019), pre-norm blocks.
    """

    def __init__(
        self, width: float = 1.0, *, vocabulary: int = 256, context: int = 128, num_blocks: int = 4, head_size: int = 32
    ) -> None:
        super().__init__()
        size = scaled(16, width) * head_size
        self.token = nn.Embedding(vocabulary, size)
        self.position = nn.Embedding(context, size)
        self.register_buffer("places", torch.arange(context), persistent=False)
        self.blocks = nn.Sequential(*(GptBlock(size, head_size) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of every next token; T is the whole context."""
        x_BTD = self.token(tokens_BT) + self.position(self.places)
        return self.head(self.norm(self.blocks(x_BTD)))
