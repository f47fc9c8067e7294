"""Makes a program by its kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hydro_slurm.errors import FusionError
from hydro_trials.fusion.compiled import CompiledProgram
from hydro_trials.fusion.fast import FastProgram
from hydro_trials.fusion.general import GeneralProgram
from hydro_trials.fusion.program import COMPILED, FAST, GENERAL, SEPARATE, Check, Loss, Program
from hydro_trials.fusion.separate import SeparateProgram


def make_program(
    kind: str,
    new_module: Callable[[], nn.Module],
    loss: Loss,
    check: Check,
    *,
    dtype: torch.dtype | None = None,
    depth: int | None = None,
) -> Program:
    """A program of this kind for modules of one structure.

    Args:
        kind: general, fast, compiled or separate.
        new_module: Makes a module that the program may keep and put hooks on.
        loss: The study's loss.
        check: Asked at the boundaries.
        dtype: What to compute in, if not in the parameters' own type.
        depth: How deep into the module tree boundaries lie; None for all; a
            compiled program has none.

    Raises:
        FusionError: No such kind, or the model cannot be run that way.
    """
    if kind == GENERAL:
        return GeneralProgram(new_module(), loss, check, dtype=dtype, depth=depth)
    if kind == FAST:
        return FastProgram(new_module(), loss, check, dtype=dtype, depth=depth)
    if kind == COMPILED:
        return CompiledProgram(new_module(), loss, check, dtype=dtype)
    if kind == SEPARATE:
        return SeparateProgram(new_module(), loss, check, dtype=dtype, depth=depth)
    raise FusionError(f"got program kind {kind!r}, needed one of {GENERAL}, {FAST}, {COMPILED}, {SEPARATE}")
