"""What may share a bundle, worked out from the study and its model; nobody is asked.

Learning rates and all other numbers of optimizers and schedules, and seeds, always do. Batch sizes do by padding and
masking, unless the model or its loss ties the samples of a batch together: then each batch size has bundles of its own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hydro_trials.fusion.intercept import lane_functions
from hydro_trials.fusion.randomness import LaneGenerators
from hydro_trials.samples import Tree, call_model, take
from hydro_trials.study import Data, Study

NUM_PROBES, PROBE_SAMPLES = 8, 64
TOLERANCE = 1e-4
"""Largest relative difference that rounding may make."""


def separating_names(study: Study, module: nn.Module, data: Data) -> tuple[str, ...]:
    """Hyperparameters in which the lanes of a bundle must agree."""
    if "batch_size" in study.space and reason_against_mixing(study, module, data):
        return ("batch_size",)
    return ()


def reason_against_mixing(study: Study, module: nn.Module, data: Data) -> str:
    """Why lanes of different batch sizes cannot share a bundle; empty where they can.

    Args:
        study: Gives the loss.
        module: One lane's model; left in training mode, its buffers as they were.
        data: Samples to try it on.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return f"module {name} ({type(part).__name__}) normalises over the samples of a batch"
    saved = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.train()
    try:
        with torch.no_grad():
            return (
                _draws(module, data)
                or _updates_buffers(module, data)
                or _mixes(module, data)
                or _is_no_mean(study, module, data)
            )
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(saved[name])


def _draws(module: nn.Module, data: Data) -> str:
    generators = LaneGenerators(torch.device("cpu"))
    generators.seed([0])
    before = torch.random.get_rng_state()
    with lane_functions(torch.zeros((), dtype=torch.long), generators) as mode:
        call_model(module, _samples(data, 0)[0])
    assert mode is not None
    if mode.num_drawn or not torch.equal(before, torch.random.get_rng_state()):
        return "the model draws random numbers, as many as a batch has samples"
    return ""


def _updates_buffers(module: nn.Module, data: Data) -> str:
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    call_model(module, _samples(data, 0)[0])
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and not torch.equal(buffer, before[name]):
            return f"the model computes its buffer {name} from a whole batch"
    return ""


def _mixes(module: nn.Module, data: Data) -> str:
    module = copy.deepcopy(module)
    for parameter in module.parameters():  # away from the beginning, where a gate may still be shut
        parameter.add_(torch.randn_like(parameter) * (0.1 * parameter.std(correction=0) + 0.2))
    x_B, _ = _samples(data, 0)
    other_B, _ = _samples(data, 1)
    changed_B = tree_map(lambda own, other: torch.cat([own[:1], other[1:]]), x_B, other_B)
    outputs = [tree_leaves(call_model(module, inputs)) for inputs in (x_B, changed_B)]
    for own, changed in zip(*outputs, strict=True):
        if isinstance(own, Tensor) and not _is_close(own[:1], changed[:1]):
            return "the model's output for one sample depends on the others in its batch"
    return ""


def _is_no_mean(study: Study, module: nn.Module, data: Data) -> str:
    for probe in range(NUM_PROBES):
        x_B, y_B = _samples(data, probe)
        output_B = call_model(module, x_B)
        whole = study.loss(output_B, y_B)
        alone = []
        for row in range(len(tree_leaves(y_B)[0])):
            output, target = tree_map(lambda leaf, row=row: leaf[row : row + 1], (output_B, y_B))
            alone.append(study.loss(output, target))
        if not _is_close(whole, torch.stack(alone).mean()):
            return "the loss of a batch is not the mean of its samples' losses"
    return ""


def _samples(data: Data, probe: int) -> tuple[Tree, Tree]:
    x_N, y_N = data.train
    count = len(tree_leaves(x_N)[0])
    index = torch.randperm(count, generator=torch.Generator().manual_seed(probe))[: min(PROBE_SAMPLES, count)]
    return take(x_N, index), take(y_N, index)


def _is_close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return bool(torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * float(one.abs().max())))
