"""Small nets that keep the architecture of well-known ones, with data that they can learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hydro_trials as hydro

VOCABULARY, NUM_POSITIONS, NUM_CLASSES = 24, 8, 5


class BasicBlock(nn.Module):
    """ResNet's block of two convolutions and a shortcut."""

    def __init__(self, incoming: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(incoming, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or incoming != out:
            self.shortcut = nn.Sequential(nn.Conv2d(incoming, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18: four stages of two blocks."""

    def __init__(self, width: float = 1.0, base: int = 32) -> None:
        super().__init__()
        sizes = [round(base * width * factor) for factor in (1, 2, 4, 8)]
        self.stem = nn.Sequential(nn.Conv2d(3, sizes[0], 3, 1, 1, bias=False), nn.BatchNorm2d(sizes[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        incoming = sizes[0]
        for stage, size in enumerate(sizes):
            blocks += [BasicBlock(incoming, size, 2 if stage else 1), BasicBlock(size, size, 1)]
            incoming = size
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(incoming, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.stem(x))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(h, 1), 1))


class Bottleneck(nn.Module):
    """WideResNet-50's block: the inner convolution is twice as wide."""

    def __init__(self, incoming: int, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(incoming, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or incoming != out:
            self.shortcut = nn.Sequential(nn.Conv2d(incoming, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.norm3(self.conv3(h)) + self.shortcut(x))


def wide_resnet50(width: float = 1.0, base: int = 16, depths: tuple[int, ...] = (2, 2)) -> nn.Module:
    """WideResNet-50 with fewer stages and blocks."""
    stem = round(base * width)
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
    incoming = stem
    for stage, depth in enumerate(depths):
        inner, out = round(2 * base * width * 2**stage), round(4 * base * width * 2**stage)
        for block in range(depth):
            layers.append(Bottleneck(incoming, inner, out, 2 if stage and not block else 1))
            incoming = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(incoming, NUM_CLASSES))


def vgg11(width: float = 1.0, base: int = 32) -> nn.Module:
    """VGG-11: eight convolutions, three linear layers."""
    layers: list[nn.Module] = []
    incoming = 3
    for factor in (1, "pool", 2, "pool", 4, 4, "pool", 8, 8, 8, 8):
        if isinstance(factor, str):
            layers.append(nn.MaxPool2d(2))
            continue
        out = round(base * factor * width)
        layers += [nn.Conv2d(incoming, out, 3, padding=1), nn.ReLU(inplace=True)]
        incoming = out
    hidden = round(base * 8 * width)
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(incoming, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, NUM_CLASSES),
    )


class SqueezeExcite(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(size, inner, 1), nn.Conv2d(inner, size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """MobileNetV3's block: expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, incoming: int, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1 and incoming == out
        self.body = nn.Sequential(
            nn.Conv2d(incoming, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.Hardswish(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            SqueezeExcite(inner, inner // 4),
            nn.Hardswish(),
            nn.Conv2d(inner, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet_v3(width: float = 1.0, base: int = 32) -> nn.Module:
    """MobileNetV3 with fewer blocks."""
    size = round(base * width)
    return nn.Sequential(
        nn.Conv2d(3, size, 3, 1, 1, bias=False),
        nn.BatchNorm2d(size),
        nn.Hardswish(),
        InvertedResidual(size, 2 * size, size, 1),
        InvertedResidual(size, 4 * size, 2 * size, 2),
        InvertedResidual(2 * size, 4 * size, 2 * size, 1),
        nn.Conv2d(2 * size, 4 * size, 1, bias=False),
        nn.BatchNorm2d(4 * size),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * size, 4 * size),
        nn.Hardswish(),
        nn.Linear(4 * size, NUM_CLASSES),
    )


def mlp(width: float = 1.0, base: int = 256) -> nn.Module:
    size = round(base * width)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, NUM_CLASSES)
    )


class Encoder(nn.Module):
    """torch's own Transformer encoder, with learned positions."""

    def __init__(self, width: float = 1.0, base: int = 128, heads: int = 8) -> None:
        super().__init__()
        size = round(base * width)
        self.inputs = nn.Linear(12, size)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, size))
        heads = max(1, round(heads * width))
        layer = nn.TransformerEncoderLayer(size, heads, 2 * size, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(size, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.head(self.encoder(self.inputs(patches) + self.positions).mean(1))


class Attention(nn.Module):
    """GPT's attention, as people write it."""

    def __init__(self, size: int, heads: int, *, scale_by: float | None = None) -> None:
        super().__init__()
        self.n_head, self.size, self.scale_by = heads, size, scale_by
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        num_samples, length, size = x.shape
        q, k, v = self.qkv(x).split(self.size, dim=2)
        q, k, v = (t.view(num_samples, length, self.n_head, size // self.n_head).transpose(1, 2) for t in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale_by)
        return self.out(h.transpose(1, 2).contiguous().view(num_samples, length, size))


class GPT(nn.Module):
    """A small GPT with learned positions and, if wanted, a tied head."""

    def __init__(self, size: int, heads: int, *, tied: bool = False, scale_by: float | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size)
        self.positions = nn.Parameter(0.5 * torch.randn(1, NUM_POSITIONS, size))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(size),
                    "attention": Attention(size, heads, scale_by=scale_by),
                    "norm2": nn.LayerNorm(size),
                    "mlp": nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size)),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index) + self.positions
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["attention"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x))


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def image_data(num_samples: int = 96) -> hydro.Data:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_samples, 3, 8, 8, generator=generator)
    y = (x.flatten(1) @ torch.randn(192, NUM_CLASSES, generator=generator)).argmax(1)
    return hydro.Data(train=(x, y), valid=(x[:16], y[:16]))


def token_data(num_samples: int = 96) -> hydro.Data:
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(VOCABULARY, (num_samples, NUM_POSITIONS), generator=generator)
    y = (x * 5 + x.roll(1, 1)) % VOCABULARY
    return hydro.Data(train=(x, y), valid=(x[:16], y[:16]))


def study_of(build: Any, optimizer: str, *, tokens: bool = False, **fields: Any) -> hydro.Study:
    """A study of any of these models."""
    data: Callable[[], hydro.Data] = token_data if tokens else image_data
    settings: dict[str, Any] = {
        "name": "net",
        "build": build,
        "data": data,
        "loss": token_loss if tokens else F.cross_entropy,
        "space": {"lr": hydro.Float(1e-4, 1e-1, log=True)},
        "optimizer": optimizer,
        "batch_size": 16,
        "steps": 40,
    }
    return hydro.Study(**{**settings, **fields})
