"""The compiled step: equal to the fast path, and refused in one line where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import sites
from hydro_trials.fusion.batch import LaneBatch
from hydro_trials.fusion.compiled import CompiledProgram
from hydro_trials.fusion.fast import FastProgram
from hydro_trials.fusion.general import GeneralProgram
from hydro_trials.fusion.program import COMPILED
from hydro_trials.fusion.programs import make_program

NUM_LANES, NUM_SAMPLES = 3, 6


@dataclass(frozen=True)
class Case:
    layers: Callable[[], list[nn.Module]]
    x: Callable[..., Tensor]
    loss: Callable[..., Tensor] = F.cross_entropy

    def build(self) -> nn.Module:
        return nn.Sequential(*self.layers()).double()


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(dim=-1)[0]


def vectors(*batch: int) -> Tensor:
    return torch.randn(*batch, 12, dtype=torch.float64)


def images(*batch: int) -> Tensor:
    return torch.randn(*batch, 3, 6, 6, dtype=torch.float64)


def words(*batch: int) -> Tensor:
    return torch.randint(0, 11, (*batch, 4))


def mlp() -> list[nn.Module]:
    return [nn.Linear(12, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 5)]


def cnn() -> list[nn.Module]:
    return [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)]


CASES = {
    "mlp": Case(mlp, vectors),
    "cnn": Case(cnn, images),
    "bag of words": Case(lambda: [nn.Embedding(11, 6, padding_idx=1), nn.Flatten(), nn.Linear(24, 5)], words),
}


def stack(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(5)
    modules = [case.build() for _ in range(NUM_LANES)]
    parameters = [{n: p.detach() for n, p in module.named_parameters()} for module in modules]
    buffers = [dict(module.named_buffers()) for module in modules]
    stacked = [{n: torch.stack([own[n] for own in lanes]) for n in lanes[0]} for lanes in (parameters, buffers)]
    return {n: p.requires_grad_() for n, p in stacked[0].items()}, stacked[1]


def make_batch(case: Case, weights_FB: Tensor | None = None) -> LaneBatch:
    leading = (NUM_LANES, NUM_SAMPLES)
    return LaneBatch(case.x(*leading), torch.randint(0, 5, leading), False, (1, 2, 3), weights_FB)


def make(kind: type, case: Case, **options: Any) -> Any:
    return kind(case.build(), case.loss, options.pop("check", lambda site: None), **options)


def assert_close(own: Any, other: Any) -> None:
    torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compare(case: Case, reference: type, backend: str, **options: Any) -> None:
    parameters, buffers = stack(case)
    other = {name: tensor.clone() for name, tensor in buffers.items()}
    asked: list[int] = []
    program = make(CompiledProgram, case, backend=backend, check=asked.append, **options)
    batch = make_batch(case)
    slow = make(reference, case, **options)
    for _ in range(2):
        own = program.gradients(parameters, buffers, batch)
        assert_close(own, slow.gradients(parameters, other, batch))
        assert_close(buffers, other)
    assert asked == [sites.BACKWARD] * 2
    x_N = case.x(3)
    assert_close(
        program.outputs(parameters, buffers, x_N, 2, batch.seeds), slow.outputs(parameters, other, x_N, 2, batch.seeds)
    )


@pytest.mark.parametrize("name", CASES)
def test_compiled_lanes(name: str) -> None:
    compare(CASES[name], FastProgram, "aot_eager")  # the compiler but for its last stage, which takes a minute


@pytest.mark.slow
def test_compiled_lanes_as_machine_code() -> None:
    compare(CASES["mlp"], FastProgram, "inductor")


def test_a_model_without_a_fast_path_is_compiled_under_vmap() -> None:
    case = Case(lambda: [nn.Linear(12, 8), Sorted(), nn.Linear(8, 5)], vectors)
    with pytest.raises(FusionError):
        make(FastProgram, case)
    compare(case, GeneralProgram, "aot_eager")


def dropped(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.dropout(output, 0.5), y)


@pytest.mark.parametrize(
    "case",
    [
        Case(lambda: [*mlp(), nn.Dropout()], vectors),
        Case(lambda: [*mlp(), Sorted(), nn.Dropout()], vectors),
        Case(mlp, vectors, dropped),
    ],
    ids=["fast", "general", "loss"],
)
def test_random_draws_are_refused(case: Case) -> None:
    with pytest.raises(FusionError, match="draws random numbers") as caught:
        make(CompiledProgram, case, backend="aot_eager").gradients(*stack(case), make_batch(case))
    assert "\n" not in str(caught.value)


def test_different_batch_sizes_are_refused() -> None:
    case = CASES["mlp"]
    batch = make_batch(case, torch.full((NUM_LANES, NUM_SAMPLES), 1 / NUM_SAMPLES))
    with pytest.raises(FusionError, match="different batch sizes"):
        make(CompiledProgram, case, backend="aot_eager").gradients(*stack(case), batch)


def test_made_by_kind() -> None:
    case = CASES["mlp"]
    assert make_program(COMPILED, case.build, case.loss, lambda site: None).kind == COMPILED
