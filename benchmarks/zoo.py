"""The models that benchmarks share, each with data, loss and sizes for the device at hand.

Images and the MLP's inputs are synthetic: a few random patterns, one per class, under noise. They have the shapes of
real ones and can be learned, which is all that speed and memory ask for. The text is real: the bytes of the sources of
Python's own library.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from nets import Gpt, Mlp, MobileNetV3, ResNet18, Vgg11, WideResNet50
from torch import Tensor, nn
from torch.nn import functional as F

from hydro_trials.study import Data, Study
from hydro_trials.study import Float as FloatRange

NUM_CLASSES, CONTEXT, VOCABULARY = 10, 128, 256


@dataclass(frozen=True)
class Size:
    """How much a model is given on one kind of device."""

    sample: tuple[int, ...]
    """Shape of one input."""
    batch_size: int
    num_samples: int


@dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    name: str
    build: Callable[[float], nn.Module]
    """`build(width)`, 1.0 being the architecture as it was published."""
    make_data: Callable[[Size], Data]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: str
    lr: float
    """A learning rate that trains; per-lane ones lie around it."""
    on_cpu: Size
    on_gpu: Size

    def size(self, device: str) -> Size:
        """Sizes for `cpu` or `cuda`."""
        return self.on_cpu if device == "cpu" else self.on_gpu

    def data(self, device: str) -> Data:
        """Training and validation samples for `cpu` or `cuda`, on the CPU; the same ones every time."""
        return self.make_data(self.size(device))

    def study(self, device: str, width_scale: float = 1.0) -> Study:
        """A study of this model, for what takes one."""
        return Study(
            name=self.name,
            build=self.build,
            data=partial(self.data, device),
            loss=self.loss,
            space={"lr": FloatRange(self.lr / 10, self.lr * 10, log=True)},
            fixed={"momentum": 0.9} if self.optimizer == "sgd" else {},
            optimizer=self.optimizer,
            batch_size=self.size(device).batch_size,
            steps=1_000_000,
            rungs=1,
            width_scale=width_scale,
        )


def synthetic(size: Size) -> Data:
    """Synthetic samples: the pattern of its class plus noise, standard deviation 1 each."""
    generator = torch.Generator().manual_seed(2)
    patterns = torch.randn(NUM_CLASSES, *size.sample, generator=generator)
    y = torch.randint(NUM_CLASSES, (size.num_samples,), generator=generator)
    x = patterns[y] + torch.randn(size.num_samples, *size.sample, generator=generator)
    return _split(x, y)


def library_text(size: Size) -> Data:
    """Windows of the bytes of Python's library: tokens (N, T) and, for each, the next one (N, T)."""
    (length,) = size.sample
    needed = size.num_samples * length + 1
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= needed:
            break
    tokens = torch.frombuffer(text[:needed], dtype=torch.uint8).long()
    return _split(tokens[:-1].view(-1, length), tokens[1:].view(-1, length))


def _split(x: Tensor, y: Tensor) -> Data:
    num_train = len(x) - len(x) // 8
    return Data(train=(x[:num_train], y[:num_train]), valid=(x[num_train:], y[num_train:]))


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all tokens of all samples."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _images(pixels: int, batch_size: int, num_samples: int) -> Size:
    return Size((3, pixels, pixels), batch_size, num_samples)


_CPU_IMAGES = _images(32, 16, 512)

MLP = Entry(
    "mlp", Mlp, synthetic, F.cross_entropy, "adam", 1e-3, on_cpu=Size((64,), 32, 2048), on_gpu=Size((64,), 256, 16384)
)
RESNET18 = Entry(
    "resnet18", ResNet18, synthetic, F.cross_entropy, "sgd", 1e-2, on_cpu=_CPU_IMAGES, on_gpu=_images(32, 256, 8192)
)
VGG11 = Entry(
    "vgg11", Vgg11, synthetic, F.cross_entropy, "sgd", 1e-2, on_cpu=_CPU_IMAGES, on_gpu=_images(32, 256, 8192)
)
MOBILENETV3 = Entry(
    "mobilenetv3",
    MobileNetV3,
    synthetic,
    F.cross_entropy,
    "sgd",
    1e-2,
    on_cpu=_CPU_IMAGES,
    on_gpu=_images(64, 128, 4096),
)
WRN50 = Entry(
    "wrn50", WideResNet50, synthetic, F.cross_entropy, "sgd", 1e-2, on_cpu=_CPU_IMAGES, on_gpu=_images(64, 64, 2048)
)
GPT = Entry(
    "gpt",
    partial(Gpt, vocabulary=VOCABULARY, context=CONTEXT),
    library_text,
    next_token_loss,
    "adamw",
    1e-3,
    on_cpu=Size((CONTEXT,), 2, 512),
    on_gpu=Size((CONTEXT,), 64, 8192),
)

ZOO = {entry.name: entry for entry in (MLP, RESNET18, VGG11, MOBILENETV3, WRN50, GPT)}
"""By name; smallest first, the language model last."""
