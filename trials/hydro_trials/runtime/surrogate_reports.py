"""`python -m hydro_trials coordinates|sweep FILE`: is the surrogate sound, and does its best learning rate hold?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hydro_slurm.errors import HydroError, StudyError, SurrogateError
from hydro_slurm.formats import write_text_atomic
from hydro_trials.runtime.report_arguments import (
    check_output,
    check_scale_argument,
    check_sweep_arguments,
    lr_bounds,
)
from hydro_trials.runtime.startup import keep_freed_memory
from hydro_trials.study import Study
from hydro_trials.study_file import describe_error, load_data, load_study
from hydro_trials.surrogate.coordinate_check import CoordinateCheck
from hydro_trials.surrogate.limits import poor_transfers
from hydro_trials.surrogate.plot import Line, chart, page, paragraphs, side_by_side
from hydro_trials.surrogate.scale import check_scale, choose_scale
from hydro_trials.surrogate.sweep import (
    Fidelity,
    WidthSweep,
    buildable,
    compare_configurations,
    draw_configurations,
    drift_octaves,
    edge_notes,
    sweep_widths,
)

FORMAT, VERSION = "hydro.surrogate-report", 1


def report_coordinates(file: Path, output: Path | None, scale: float | None, *, as_json: bool) -> str:
    """The coordinate check of a study's surrogate, at up to five widths; its plot goes to `output`.

    Raises:
        HydroError: The study cannot be used, or its model not be shrunk.
    """
    check_output(output)
    if scale is not None:
        check_scale_argument("--scale", scale)
    study = _load(file, scale)
    data = load_data(study)
    with _naming(file):
        surrogate = choose_scale(study, data, gate=False).surrogate
        if surrogate.width_scale == 1:
            raise SurrogateError("width_scale is 1: the target trains itself; name a width scale to check (--scale)")
        checked = check_scale(study, data, surrogate, quick=False)
    problems = checked.problems
    if output is not None:
        write_text_atomic(output, _drawn(output, *_coordinate_page(study, checked, problems)))
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "study": study.name,
        "width_scale": surrogate.width_scale,
        "width_scales": list(checked.width_scales),
        "lr": checked.lr,
        "num_steps": checked.num_steps,
        "passed": not problems,
        "problems": problems,
        "warnings": [*surrogate.notes, *poor_transfers(study)],
        "slopes": {
            name: {"initial": _number(checked.initial[name].value), "changes": [_number(s.value) for s in slopes]}
            for name, slopes in checked.slopes.items()
        },
        "output": str(output) if output else None,
    }
    if as_json:
        return json.dumps(document)
    return "\n".join(_coordinate_lines(document))


def report_sweep(
    file: Path,
    output: Path | None,
    *,
    scales: Sequence[float] | None,
    num_lrs: int,
    num_steps: int | None,
    num_seeds: int,
    num_configurations: int,
    as_json: bool,
) -> str:
    """Learning-rate sweeps at several widths, with muP and without, and how random configurations rank.

    Raises:
        HydroError: The study cannot be used, its model not be shrunk, or it searches no learning rate.
    """
    check_output(output)
    check_sweep_arguments(scales, num_lrs, num_steps, num_seeds, num_configurations)
    study = _load(file, None)
    low, high = lr_bounds(study.space.get("lr"))
    if num_configurations and study.width_scale == 1:
        raise SurrogateError(
            f"--configurations {num_configurations}: the study's width_scale is 1, so there is no surrogate "
            "whose ranking could be compared; set Study.width_scale, or leave the option out"
        )
    data = load_data(study)
    surrogate = choose_scale(study, data, gate=False).surrogate
    largest = surrogate.width_scale if surrogate.width_scale > 1 else 4.0
    widths = sorted(set(scales or [1.0, math.sqrt(largest), largest] if largest < 4 else scales or _halvings(largest)))
    widths, refused = buildable(study, data, widths)
    lrs = [low * (high / low) ** (index / (num_lrs - 1)) for index in range(num_lrs)]
    steps = num_steps or study.steps
    sweeps = sweep_widths(study, data, widths, lrs, num_steps=steps, num_seeds=num_seeds)
    drift = {kind: _number(drift_octaves([each for each in sweeps if each.parametrization == kind])) for kind in _KINDS}
    fidelity = None
    if num_configurations and surrogate.width_scale > 1:
        drawn = draw_configurations(study.space, num_configurations, study.seed)
        fidelity = compare_configurations(study, data, surrogate, drawn, num_steps=steps, num_seeds=num_seeds)
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "study": study.name,
        "num_steps": steps,
        "num_seeds": num_seeds,
        "drift_octaves": drift,
        "sweeps": [
            {
                "width_scale": each.width_scale,
                "parametrization": each.parametrization,
                "best_lr": each.best_lr,
                "lrs": list(each.lrs),
                "losses": [_number(loss) for loss in each.losses],
            }
            for each in sweeps
        ],
        "fidelity": _fidelity_record(fidelity) if fidelity else None,
        "warnings": [
            *(f"S={scale:g} is left out: {reason}" for scale, reason in refused.items()),
            *edge_notes(sweeps),
            *poor_transfers(study),
        ],
        "output": str(output) if output else None,
    }
    lines = _sweep_lines(document)
    if output is not None:
        write_text_atomic(output, _drawn(output, *_sweep_page(study, sweeps, lines)))
    return json.dumps(document) if as_json else "\n".join(lines)


_KINDS = ("mup", "standard")


def _load(file: Path, scale: float | None) -> Study:
    torch.set_num_threads(1)
    keep_freed_memory()
    study = load_study(file)
    if scale is not None:
        fields = {name: getattr(study, name) for name in study.__dataclass_fields__}
        study = Study(**{**fields, "width_scale": scale})
    return study


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Whatever the user's model raises becomes one line that says where in the file.

    Raises:
        StudyError: That line.
    """
    try:
        yield
    except HydroError:
        raise
    except Exception as error:
        raise StudyError(f"training a step failed: {describe_error(error, file.absolute())}") from error


def _halvings(scale: float) -> list[float]:
    widths = [scale]
    while widths[-1] / 2 > 1:
        widths.append(widths[-1] / 2)
    return [*widths, 1.0]


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _fidelity_record(fidelity: Fidelity) -> dict[str, Any]:
    return {
        "width_scale": fidelity.width_scale,
        "num_configurations": len(fidelity.configurations),
        "kendall_tau": fidelity.tau,
        "regret": {str(k): _number(fidelity.regret(k)) for k in (1, 2, 3)},
        "seed_noise": _number(fidelity.seed_noise),
    }


def _coordinate_lines(document: dict[str, Any]) -> list[str]:
    widths = ", ".join(f"{scale:g}" for scale in document["width_scales"])
    lines = [f"coordinate check of {document['study']} at S = {widths}: {'passed' if document['passed'] else 'FAILED'}"]
    lines += [f"  {problem}" for problem in document["problems"]]
    lines += [
        f"  {name:<48} start {_signed(slopes['initial'])}  steps {' '.join(map(_signed, slopes['changes']))}"
        for name, slopes in document["slopes"].items()
    ]
    lines += [f"  note: {warning}" for warning in document["warnings"]]
    return lines + ([f"plot: {document['output']}"] if document["output"] else [])


def _signed(value: float | None) -> str:
    return "  inf" if value is None else f"{value:+.2f}"


def _sweep_lines(document: dict[str, Any]) -> list[str]:
    lines = []
    for kind, words in (("mup", "with muP"), ("standard", "without")):
        best = ", ".join(
            f"{'none' if each['best_lr'] is None else format(each['best_lr'], '.3g')} (S={each['width_scale']:g})"
            for each in document["sweeps"]
            if each["parametrization"] == kind
        )
        drift = document["drift_octaves"][kind]
        lines.append(f"best lr {words}: {best}; drift {'unknown' if drift is None else f'{drift:.2f} octaves'}")
    fidelity = document["fidelity"]
    if fidelity:
        regrets = ", ".join(f"regret@{k} {value}" for k, value in fidelity["regret"].items())
        lines.append(
            f"{fidelity['num_configurations']} configurations, S={fidelity['width_scale']:g}: Kendall tau "
            f"{fidelity['kendall_tau']:.2f}, {regrets}, seed noise {fidelity['seed_noise']}"
        )
    lines += [f"note: {warning}" for warning in document["warnings"]]
    return lines + ([f"plot: {document['output']}"] if document["output"] else [])


def _drawn(output: Path, title: str, lines: list[str], charts: list[str]) -> str:
    """An SVG image of the charts for a file named so; else a page that says the lines too."""
    return side_by_side(charts) if output.suffix == ".svg" else page(title, [paragraphs(lines), *charts])


def _coordinate_page(study: Study, checked: CoordinateCheck, problems: list[str]) -> tuple[str, list[str], list[str]]:
    widths = [1 / scale for scale in checked.width_scales]
    verdict = ["passed: no module's change depends on width"] if not problems else [f"FAILED: {p}" for p in problems]
    charts = [
        chart(
            f"after step {step + 1}",
            "width (target = 1)",
            "mean |change of output|",
            [Line(name, widths, steps[step]) for name, steps in checked.changes.items()],
        )
        for step in range(checked.num_steps)
    ]
    return f"Coordinate check of {study.name}", verdict, charts


def _sweep_page(study: Study, sweeps: list[WidthSweep], lines: list[str]) -> tuple[str, list[str], list[str]]:
    charts = [
        chart(
            {"mup": "with muP", "standard": "without"}[kind],
            "learning rate",
            "validation loss",
            [Line(f"S={each.width_scale:g}", each.lrs, each.losses) for each in sweeps if each.parametrization == kind],
        )
        for kind in _KINDS
    ]
    return f"Learning rates of {study.name} over width", lines, charts
