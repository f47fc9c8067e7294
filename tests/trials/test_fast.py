"""The fast path: equal to the general path and to lanes one by one, or refused by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import sites
from hydro_trials.fusion.agreement import check_agreement
from hydro_trials.fusion.batch import LaneBatch
from hydro_trials.fusion.fast import FastProgram
from hydro_trials.fusion.general import GeneralProgram
from hydro_trials.fusion.program import FAST, boundary_modules
from hydro_trials.fusion.programs import make_program
from hydro_trials.fusion.separate import SeparateProgram
from hydro_trials.surrogate.surrogate import _ScaleInput

NUM_LANES, NUM_SAMPLES = 3, 6


def image(num: int = 8) -> Callable[..., Tensor]:
    return lambda *batch: torch.randn(*batch, 3, num, num, dtype=torch.float64)


def words(*batch: int) -> Tensor:
    return torch.randint(0, 11, (*batch, 5))


def vectors(*batch: int) -> Tensor:
    return torch.randn(*batch, 12, dtype=torch.float64)


class Residual(nn.Module):
    """As the ResNets of torchvision have it: in-place activations and additions."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out)
        self.conv2, self.norm2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False), nn.BatchNorm2d(num_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride), nn.BatchNorm2d(num_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(
        *stem, Residual(4, 4, 1), Residual(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def cumulative() -> nn.Module:
    """A batch norm that averages over all batches so far, which lanes have seen different numbers of."""
    return nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 5))


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Hardswish(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"),
        nn.GroupNorm(2, 8),
        nn.PReLU(8),
        nn.Conv2d(8, 6, 1, groups=2),
        nn.BatchNorm2d(6, affine=False),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 5),
    )


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(True),
        nn.Dropout2d(0.3),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.ReLU(True),
        nn.Dropout(0.5),
        nn.Linear(16, 5),
    )


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(8, 24), nn.Linear(8, 8), dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(x).split(c, dim=2)
        q, k, v = (part.view(b, t, 2, c // 2).transpose(1, 2) for part in (q, k, v))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class GPT(nn.Module):
    """Tied embedding and head, learned positions, pre-norm blocks."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 8, padding_idx=2), nn.Embedding(6, 8)
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(8), Attention(dropout), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm3, self.head = nn.RMSNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.token.weight
        self.drop = nn.Dropout(dropout)

    def forward(self, index: Tensor) -> Tensor:
        positions = torch.arange(index.shape[1], device=index.device)
        x = self.drop(self.token(index) + self.position(positions))
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x))[:, -1]


class HandMade(nn.Module):
    """Attention by its formula, a buffer as mask, a parameter used directly, a module called twice, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(8))
        self.register_buffer("mask", torch.ones(6, 6).tril().bool())
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 5), "b": nn.Linear(16, 2)})

    def forward(self, index: Tensor) -> dict[str, Tensor]:
        x = self.mix(self.mix(self.embed(index)).tanh())
        scores = x @ x.mT / torch.tensor(8.0).sqrt() * self.scale
        scores = scores.masked_fill(~self.mask[: x.size(1), : x.size(1)], float("-inf"))
        x = torch.softmax(scores, dim=-1) @ x + self.shift
        left, right = x.chunk(2, dim=-1)
        both = torch.cat([right, left, x.flip(-1)], dim=2)
        pooled = both.permute(0, 2, 1).mean(-1).unsqueeze(1).expand(-1, 2, -1)[:, 1]
        return {"a": self.heads["a"](x.sum(1)), "b": self.heads["b"](F.normalize(pooled, dim=-1))}


class Branches(nn.Module):
    """Channels joined and taken apart, squeeze and excitation, a shared constant, functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.norm, self.squeeze = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.gamma = nn.Parameter(torch.randn(6, 1, 1))
        self.up, self.out = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.cat([F.relu(self.left(x), inplace=True), self.right(x)], dim=1))
        y = y * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(y, 1))) + self.gamma * y
        first, second = torch.split(y, [2, 4], dim=1)
        y = F.max_pool2d(self.up(torch.cat((second, first), 1)), 2)
        y = F.interpolate(F.pad(y, (1, 1)), scale_factor=2.0)
        bias = torch.linspace(0, 1, 4, dtype=x.dtype).view(1, 4, 1, 1)
        y = F.dropout(y + bias, 0.25, self.training)
        return self.out(y.mean([2, 3]))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(12), nn.Linear(12, 5)
        self.frozen = nn.Parameter(torch.ones(12) * 2, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x) * self.frozen)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5))


class Odd(nn.Module):
    """What nets do now and then: einsum, indices, comparisons, odd reductions, shapes from shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(12, 12), nn.Linear(6, 5)
        self.weight = nn.Parameter(torch.randn(12, 6))
        self.register_buffer("order", torch.randperm(12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        rows = y.shape[0]
        y = F.relu(y, inplace=True)
        y = torch.where(y > 0.1, y, -x)[:, self.order]
        y = y + y.std(dim=1, keepdim=True) + y.mean() + y.sum(None, keepdim=True) / math.sqrt(y.numel())
        y = torch.stack([y, y.clamp(-1, 1)], dim=1).reshape(rows, -1, 12).transpose(-1, -2).mT[:, 1]
        y = y.view(rows, 3, 4).flip(1).flatten(1)[:, [2, 1, 0, *range(3, 12)]] - torch.ones(12, dtype=x.dtype)
        z = torch.einsum("bi,io->bo", y, self.weight) + torch.matmul(x, self.weight) + (x * x)[..., :6]
        z += x.unsqueeze(1).repeat(1, 2, 1)[:, [0, 1], [3, 4]].amax(-1, keepdim=True)
        return self.out(z) * z.norm(dim=1, keepdim=True).detach()


def two_heads(output: dict[str, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(output["a"], y) + F.mse_loss(output["b"].sum(-1), y.to(output["b"].dtype))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    x: Callable[..., Tensor]
    loss: Callable[..., Tensor] = F.cross_entropy
    has_batch_norm: bool = False
    is_by_sample: bool = True


CASES = {
    "mlp": Case(mlp, vectors),
    "resnet": Case(resnet, image(), has_batch_norm=True),
    "depthwise": Case(depthwise, image(), has_batch_norm=True),
    "vgg": Case(vgg, image()),
    "odd": Case(Odd, vectors, is_by_sample=False),
    "branches": Case(Branches, image(), has_batch_norm=True),
    "gpt": Case(GPT, words),
    "gpt with dropout": Case(lambda: GPT(0.4), words),
    "hand-made": Case(HandMade, words, two_heads),
    "frozen": Case(Table, vectors, has_batch_norm=True),
    "label smoothing": Case(mlp, vectors, nn.CrossEntropyLoss(label_smoothing=0.1)),
    "drawing loss": Case(
        mlp, vectors, lambda output, y: F.cross_entropy(F.dropout(output, 0.5), y), is_by_sample=False
    ),  # padding changes how much it draws
}


def stack(case: Case, num_lanes: int = NUM_LANES) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters, buffers = [], []
    for lane in range(num_lanes):
        torch.manual_seed(lane)
        module = case.build().double()
        parameters.append({n: p.detach() for n, p in module.named_parameters() if p.requires_grad})
        buffers.append(dict(module.named_buffers()))
    stacked = {n: torch.stack([own[n] for own in parameters]).requires_grad_() for n in parameters[0]}
    for lane, own in enumerate(buffers):  # lanes at different steps
        for name, tensor in own.items():
            own[name] = tensor + lane if name.endswith("num_batches_tracked") else tensor
    return stacked, {n: torch.stack([own[n] for own in buffers]) for n in buffers[0]}


def test_a_batch_norm_that_averages_over_all_batches() -> None:
    case = Case(cumulative, vectors)
    parameters, buffers = stack(case)
    other = cloned(buffers)
    batch = make_batch(case, shared=False)
    # vmap cannot run it: it reads the number of batches
    assert_close(
        make(FastProgram, case).gradients(parameters, buffers, batch),
        make(SeparateProgram, case).gradients(parameters, other, batch),
    )
    assert_close(buffers, other)


def make_batch(case: Case, *, shared: bool, sizes: tuple[int, ...] | None = None) -> LaneBatch:
    torch.manual_seed(99)
    leading = (NUM_SAMPLES,) if shared else (NUM_LANES, NUM_SAMPLES)
    weights = None
    if sizes is not None:
        weights = torch.zeros(NUM_LANES, NUM_SAMPLES, dtype=torch.float64)
        for lane, size in enumerate(sizes):
            weights[lane, :size] = 1 / size
    seeds = tuple(range(40, 40 + NUM_LANES))
    return LaneBatch(case.x(*leading), torch.randint(0, 5, leading), shared, seeds, weights)


def make(kind: type, case: Case, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(case.build().double(), case.loss, options.pop("check", lambda site: None), **options)


def assert_close(own: Any, other: Any, tolerance: float = 1e-10) -> None:
    for a, b in zip(tree_leaves(own), tree_leaves(other), strict=True):
        scale = max(1.0, float(b.detach().double().abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def cloned(tree: Any) -> Any:
    return tree_map(torch.clone, tree)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own samples"])
@pytest.mark.parametrize("reference", [GeneralProgram, SeparateProgram])
@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_buffers_and_outputs(name: str, reference: type, shared: bool) -> None:
    case = CASES[name]
    parameters, buffers = stack(case)
    other = cloned(buffers)
    batch = make_batch(case, shared=shared)
    fast, slow = make(FastProgram, case), make(reference, case)
    for step in range(2):  # what a program remembers of its first pass does no harm in the second
        seeded = LaneBatch(batch.x, batch.y, shared, tuple(seed + step for seed in batch.seeds))
        assert_close(fast.gradients(parameters, buffers, seeded), slow.gradients(parameters, other, seeded))
        assert_close(buffers, other)
    x_N = case.x(7)
    own = fast.outputs(parameters, buffers, x_N, 3, batch.seeds)
    expected = slow.outputs(parameters, other, x_N, 3, batch.seeds)
    assert_close(own, expected)
    assert_close(buffers, other)
    assert not any(leaf.requires_grad for leaf in tree_leaves(own))


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.is_by_sample and not case.has_batch_norm]
)
def test_batch_sizes_that_differ(name: str) -> None:
    case = CASES[name]
    parameters, buffers = stack(case)
    batch = make_batch(case, shared=False, sizes=(6, 2, 5))
    expected = make(GeneralProgram, case).gradients(parameters, cloned(buffers), batch)
    assert_close(make(FastProgram, case).gradients(parameters, buffers, batch), expected)


@pytest.mark.parametrize("name", ["mlp", "resnet", "vgg", "gpt"])
def test_a_lane_that_is_not_a_number_reaches_no_neighbour(name: str) -> None:
    case = CASES[name]
    parameters, buffers = stack(case)
    broken = {n: p.detach().clone() for n, p in parameters.items()}
    for tensor in broken.values():
        tensor[1] = torch.nan
        tensor.requires_grad_()
    for shared in (True, False):
        batch = make_batch(case, shared=shared)
        mine, theirs = cloned(buffers), cloned(buffers)
        sound = make(FastProgram, case).gradients(parameters, mine, batch)
        sick = make(FastProgram, case).gradients(broken, theirs, batch)
        assert sick[0][1].isnan()
        for a, b in zip(tree_leaves((sound, mine)), tree_leaves((sick, theirs)), strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])


@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt"])
def test_lower_precision(name: str) -> None:
    case = CASES[name]
    parameters, buffers = stack(case)
    parameters = {n: p.detach().float().requires_grad_() for n, p in parameters.items()}
    buffers = {n: b.float() if b.is_floating_point() else b for n, b in buffers.items()}
    batch = make_batch(case, shared=False)
    x = batch.x.float() if batch.x.is_floating_point() else batch.x
    batch = LaneBatch(x, batch.y, False, batch.seeds)
    programs = [
        kind(case.build(), case.loss, lambda site: None, dtype=torch.bfloat16)
        for kind in (FastProgram, SeparateProgram)
    ]
    (losses, gradients), (others, expected) = (p.gradients(parameters, cloned(buffers), batch) for p in programs)
    single = FastProgram(case.build(), case.loss, lambda site: None)
    full, exact = single.gradients(parameters, cloned(buffers), batch)
    assert not torch.equal(losses, full)
    torch.testing.assert_close(losses.float(), others.float(), rtol=2e-2, atol=2e-2)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    # Both round to 8 bits at each layer, each in its own order: neither is further from the truth than the other.
    own, other, true = (torch.cat([g.flatten() for g in tensors]) for tensors in (gradients, expected, exact))
    assert float((own - true).norm()) < 2 * float((other - true).norm())


@pytest.mark.parametrize("depth", [None, 0, 1, 2])
@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt", "hand-made"])
def test_the_gate_is_asked_at_every_boundary(name: str, depth: int | None) -> None:
    case = CASES[name]
    parameters, buffers = stack(case)
    seen: dict[type, list[int]] = {FastProgram: [], GeneralProgram: []}
    for kind, asked in seen.items():
        program = make(kind, case, depth=depth, check=asked.append)
        program.gradients(parameters, cloned(buffers), make_batch(case, shared=False))
        program.outputs(parameters, cloned(buffers), case.x(2), 2, (1, 2, 3))
    own, other = (Counter(asked) for asked in seen.values())
    if name == "resnet":  # under vmap, writing in place to what a hook waits for takes the hook off
        assert other <= own
    else:
        assert own == other
    if name != "hand-made":  # a ModuleDict is never called
        numbers = range(len(boundary_modules(case.build(), depth)))
        assert all(own[sites.after_forward(n)] == own[sites.in_backward(n)] > 0 for n in numbers)


def test_the_gate_may_end_a_pass_in_backward() -> None:
    case = CASES["mlp"]
    parameters, buffers = stack(case)
    program = make(FastProgram, case)

    def leave(site: int) -> None:
        if site == sites.in_backward(1):
            raise KeyboardInterrupt

    program.set_check(leave)
    with pytest.raises(KeyboardInterrupt):
        program.gradients(parameters, buffers, make_batch(case, shared=True))


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_a_readouts_input_is_scaled(name: str) -> None:
    case = CASES[name]

    def build() -> nn.Module:
        module = case.build()
        head = module[-1] if isinstance(module, nn.Sequential) else module.head
        head.register_forward_pre_hook(_ScaleInput(0.25))
        return module

    scaled = Case(build, case.x, case.loss)
    parameters, buffers = stack(case)
    batch = make_batch(case, shared=True)
    expected = make(GeneralProgram, scaled).gradients(parameters, buffers, batch)
    assert_close(make(FastProgram, scaled).gradients(parameters, buffers, batch), expected)
    assert not torch.allclose(make(FastProgram, case).gradients(parameters, buffers, batch)[0], expected[0])


def test_a_readout_that_is_the_whole_model() -> None:
    def build() -> nn.Module:
        module = nn.Linear(12, 5)
        module.register_forward_pre_hook(_ScaleInput(0.25))
        return module

    case = Case(build, vectors)
    parameters, buffers = stack(case)
    batch = make_batch(case, shared=False)
    asked: list[int] = []
    expected = make(GeneralProgram, case).gradients(parameters, buffers, batch)
    assert_close(make(FastProgram, case, check=asked.append).gradients(parameters, buffers, batch), expected)
    assert asked == [sites.after_forward(0), sites.BACKWARD, sites.in_backward(0)]


class Inner(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function, self.count = nn.Linear(12, 12), function, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.linear(x))


def changes_input(module: Any, x: Tensor) -> Tensor:
    y = x.view(-1)
    return y.mul_(2).view_as(x) + x


def counts(module: Any, x: Tensor) -> Tensor:
    module.count += 1
    return x


REFUSED = {
    "branch on values": (lambda module, x: x if x.sum() > 0 else -x, "trace module 0.*TraceError"),
    "item": (lambda module, x: x * x.sum().item(), r"item .*in module 0 \(Inner\)"),
    "mask": (lambda module, x: x[x > 0], "mask gives each lane another shape"),
    "draw": (lambda module, x: x + torch.randn(12), r"randn, which draws .* in module 0 \(Inner\)"),
    "draw alike": (lambda module, x: x + torch.randn_like(x), r"randn_like, which draws .* in module 0 \(Inner\)"),
    "unknown function": (lambda module, x: torch.fft.fft(x).real, r"fft_fft .*in module 0 \(Inner\)"),
    "unknown method": (lambda module, x: x.sort()[0], r"sort .*in module 0 \(Inner\)"),
    "unknown attribute": (lambda module, x: x * x.itemsize, r"attribute itemsize .*in module 0 \(Inner\)"),
    "written and read": (changes_input, r"mul_ .*in module 0 \(Inner\): it changes in place"),
    "state": (counts, "changes its attribute 0.count"),
    "assignment": (lambda module, x: x.__setitem__(0, 0.0) or x, "setitem|does not support item assignment|trace"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    function, message = REFUSED[name]
    case = Case(lambda: nn.Sequential(Inner(function), nn.Linear(12, 5)), vectors)
    with pytest.raises(FusionError, match=message):
        make(FastProgram, case).gradients(*stack(case), make_batch(case, shared=False))


def modules_refused() -> Iterator[tuple[str, Callable[[], nn.Module], str]]:
    def hooked(register: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            module = mlp()
            getattr(module[2], register)(lambda module, *args: None)
            return module

        return build

    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        yield register, hooked(register), r"hook .* on module 2 \(LayerNorm\)"
    yield "recurrent", lambda: nn.Sequential(nn.LSTM(12, 5)), r"does not know 0 .*in module 0 \(LSTM\)"
    parametrized = torch.nn.utils.parametrizations.spectral_norm
    yield "parametrized", lambda: nn.Sequential(parametrized(nn.Linear(12, 5))), "fast path"
    max_norm = nn.Embedding(11, 5, max_norm=1.0)
    yield "max_norm", lambda: nn.Sequential(max_norm), "max_norm"


@pytest.mark.parametrize(("build", "message"), [pytest.param(b, m, id=n) for n, b, m in modules_refused()])
def test_modules_that_are_not_known_are_refused_by_name(build: Callable[[], nn.Module], message: str) -> None:
    case = Case(build, words if message == "max_norm" else vectors)
    with pytest.raises(FusionError, match=message):
        make(FastProgram, case).gradients(*stack(case), make_batch(case, shared=False))


def test_a_dimension_that_only_lanes_have_is_refused() -> None:
    case = Case(lambda: nn.Sequential(nn.Linear(12, 5), Summed()), vectors)
    with pytest.raises(IndexError, match="dimension -3"):
        make(FastProgram, case).gradients(*stack(case), make_batch(case, shared=False))


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-3)


@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt with dropout"])
def test_a_program_proves_itself(name: str) -> None:
    case = CASES[name]
    parameters, buffers = stack(case)
    before = cloned(buffers)
    batch = make_batch(case, shared=False)
    fast, general = make(FastProgram, case), make(GeneralProgram, case)
    check_agreement(fast, general, parameters, buffers, batch, 1e-10)
    assert_close(buffers, before, 0)
    wrong = make(FastProgram, Case(case.build, case.x, lambda output, y: F.cross_entropy(output, y) * 1.001))
    with pytest.raises(FusionError, match=r"losses differ by 0\.001 of the largest value, needed at most 1e-10"):
        check_agreement(wrong, general, parameters, buffers, batch, 1e-10)


def test_a_program_that_fails_does_not_agree() -> None:
    case = Case(lambda: nn.Sequential(nn.Linear(12, 5), Summed()), vectors)
    other = CASES["mlp"]
    torch.manual_seed(0)
    with pytest.raises(FusionError, match=r"fails where the general one does not: .*dimension -3"):
        general = make(GeneralProgram, Case(lambda: nn.Sequential(nn.Linear(12, 5)), other.x))
        check_agreement(make(FastProgram, case), general, *stack(case), make_batch(case, shared=True), 1e-9)


def test_programs_are_made_by_kind() -> None:
    program = make_program(FAST, mlp, F.cross_entropy, lambda site: None)
    assert program.kind == FAST
