"""Which width scale a study gets, the gate on submission, the limits that are said aloud, and the reports."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from small_nets import GPT, NUM_CLASSES, mlp, study_of
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_slurm.cli.main import main
from hydro_slurm.errors import StudyError, SurrogateError
from hydro_trials.runtime.check import check_study
from hydro_trials.runtime.describe import AUTO_SCALE, to_description
from hydro_trials.runtime.surrogate_reports import report_coordinates, report_sweep
from hydro_trials.surrogate import make_surrogate
from hydro_trials.surrogate.fidelity import kendall_tau, regret_at
from hydro_trials.surrogate.limits import poor_transfers
from hydro_trials.surrogate.scale import choose_scale
from hydro_trials.surrogate.sweep import WidthSweep, drift_octaves, edge_notes

STUDY = """
import torch
from torch import nn
import hydro_trials as hydro

class Unscaled(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.inside, self.middle, self.head = nn.Linear(6, size), nn.Linear(size, size), nn.Linear(size, 3)
        self.size = size

    def forward(self, x):
        return self.head(self.middle(self.inside(x) * GAIN).relu())

def build(width):
    return Unscaled(round(64 * width))

def data():
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    return hydro.Data(train=(x[:60], y[:60]), valid=(x[60:], y[60:]))

study = hydro.Study(
    name="tiny", build=build, data=data, loss=nn.functional.cross_entropy, batch_size=12, steps=9, width_scale=4,
    space={"lr": hydro.Float(1e-3, 1.0, log=True), "weight_decay": hydro.Float(0.0, 0.1)}, optimizer="sgd",
)
"""
SOUND, WRONG = STUDY.replace("* GAIN", ""), STUDY.replace("GAIN", "self.size")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.py"
    path.write_text(SOUND)
    return path


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    return path


def test_auto_takes_the_largest_scale_that_divides_and_passes() -> None:
    """Six heads: 8, 7, 5 and 4 do not divide them."""
    study = study_of(GPT(96, 6), "adam", tokens=True, width_scale="auto")
    chosen = choose_scale(study, study.data(), gate=True)
    assert chosen.surrogate.width_scale == 6
    assert chosen.check is not None
    assert chosen.check.problems == []
    assert set(chosen.refused) == {8.0, 7.0}
    bounded = dataclasses.replace(study, max_width_scale=3.5)
    assert choose_scale(bounded, study.data(), gate=True).surrogate.width_scale == 3


def test_auto_says_why_nothing_works() -> None:
    study = study_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "sgd", width_scale="auto", max_width_scale=2)
    with pytest.raises(SurrogateError, match=r"no width_scale from 2 to 2 works .*set width_scale to 1"):
        choose_scale(study, study.data(), gate=True)


class Pairs(nn.Module):
    """Turns pairs of its elements: an odd width can be built, but not run."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            raise ValueError(f"{x.shape[-1]} elements are no pairs")
        return x.roll(x.shape[-1] // 2, -1)


def test_auto_goes_on_where_the_forward_fails() -> None:
    def build(width: float) -> nn.Module:
        size = round(60 * width)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, size), nn.ReLU(), Pairs(), nn.Linear(size, NUM_CLASSES))

    study = study_of(build, "adam", width_scale="auto", max_width_scale=4)
    chosen = choose_scale(study, study.data(), gate=True)
    assert chosen.surrogate.width_scale == 3
    assert "module 3 does not run at width_scale 4: " in chosen.refused[4.0]
    assert "15 elements are no pairs" in chosen.refused[4.0]


def test_what_a_model_raises_in_a_coordinate_check_names_the_file(sound: Path) -> None:
    sound.write_text(SOUND.replace("return self.head(", "raise ValueError('no such thing')\n        return self.head("))
    with pytest.raises(SurrogateError, match=r"does not run at width_scale 4: .*sound\.py:13: .*no such thing"):
        report_coordinates(sound, None, None, as_json=True)
    sound.write_text(SOUND.replace("loss=nn.functional.cross_entropy", "loss=lambda output, target: output.no_such()"))
    with pytest.raises(StudyError, match=r"training a step failed: .*sound\.py:.*no_such"):
        report_coordinates(sound, None, None, as_json=True)


def test_auto_is_decided_by_check_not_by_describe() -> None:
    study = study_of(mlp, "adam", width_scale="auto")
    assert to_description(study)["width_scale"] == AUTO_SCALE
    with pytest.raises(StudyError, match=r"width_scale: got .big., needed a number"):
        study_of(mlp, "adam", width_scale="big")


def test_a_study_whose_surrogate_would_not_transfer_is_refused(wrong: Path) -> None:
    with pytest.raises(SurrogateError, match=r"width_scale 4 would not transfer: module middle .*surrogate check"):
        check_study(wrong, as_json=True)
    wrong.write_text(WRONG.replace("width_scale=4", "width_scale=4, coordinate_check='warn'"))
    found = json.loads(check_study(wrong, as_json=True))
    assert found["coordinate_check"]["problems"]
    assert found["warnings"][0] == found["coordinate_check"]["problems"][0]


def test_the_target_itself_is_not_checked(sound: Path) -> None:
    sound.write_text(SOUND.replace("width_scale=4", "width_scale=1"))
    assert json.loads(check_study(sound, as_json=True))["coordinate_check"] is None


def test_what_transfers_poorly_is_said_with_the_choice() -> None:
    space = {"lr": hydro.Float(1e-4, 1e-1, log=True), "weight_decay": hydro.Float(0, 1)}
    (warning,) = poor_transfers(study_of(mlp, "adamw", space=space, width_scale=4))
    assert "weight_decay transfers poorly" in warning
    assert "Study.fixed" in warning
    assert "width_scale=1" in warning
    assert poor_transfers(study_of(mlp, "adamw", space=space)) == []


def test_decoupled_decay_has_a_switch() -> None:
    kept = make_surrogate(mlp, 4, "adamw").rules["3.weight"]
    free = make_surrogate(mlp, 4, "adamw", scale_decay=False).rules["3.weight"]
    assert (kept.lr * kept.weight_decay, free.weight_decay) == (1.0, 1.0)


def test_surrogate_check_prints_a_verdict_and_draws(
    sound: Path, wrong: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["surrogate", "check", str(sound), "--output", str(tmp_path / "plot.html")]) == 0
    printed = capfd.readouterr().out
    assert "coordinate check of tiny at S = 1, 2, 4: passed" in printed
    assert "weight_decay transfers poorly" in printed
    plot = (tmp_path / "plot.html").read_text()
    assert plot.count("<svg") == 3
    assert "polyline" in plot
    assert main(["surrogate", "check", str(wrong), "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert not found["passed"]
    assert "module middle" in found["problems"][0]


def test_surrogate_sweep_compares_with_and_without_mup(
    sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--lrs", "4", "--steps", "6", "--seeds", "1", "--configurations", "4"]
    assert main(["surrogate", "sweep", str(sound), *options, "--output", str(tmp_path / "sweep.html"), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {(each["width_scale"], each["parametrization"]) for each in found["sweeps"]} == {
        (scale, kind) for scale in (1, 2, 4) for kind in ("mup", "standard")
    }
    assert set(found["drift_octaves"]) == {"mup", "standard"}
    assert found["fidelity"]["num_configurations"] == 4
    assert set(found["fidelity"]["regret"]) == {"1", "2", "3"}
    assert (tmp_path / "sweep.html").read_text().count("<svg") == 2


def sweep(file: Path, **options: Any) -> str:
    defaults = {"scales": None, "num_lrs": 3, "num_steps": None, "num_seeds": 1, "num_configurations": 0}
    return report_sweep(file, options.pop("output", None), as_json=True, **{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_lrs": 1}, "--lrs: got 1, needed 2 or more"),
        ({"num_lrs": 0}, "--lrs: got 0, needed 2 or more"),
        ({"num_seeds": 0}, "--seeds: got 0, needed 1 or more"),
        ({"num_steps": 0}, "--steps: got 0, needed 1 or more"),
        ({"num_steps": -2}, "--steps: got -2, needed 1 or more"),
        ({"scales": [2, 0]}, "--scales: got 0, needed a number of 1 or more"),
        ({"num_configurations": 1}, r"--configurations: got 1, needed 0 \(none\) or 2 or more"),
        ({"num_configurations": -2}, r"--configurations: got -2, needed 0 \(none\) or 2 or more"),
        ({"output": Path("plot.png")}, "--output plot.png: needed a name that ends with .html or .svg"),
        ({"output": Path("no/such/plot.svg")}, "--output no/such/plot.svg: there is no folder .*; make it first"),
    ],
)
def test_wrong_arguments_of_a_sweep_end_at_once(options: dict[str, Any], complaint: str) -> None:
    """Before the study is read: the file need not even exist."""
    with pytest.raises(SurrogateError, match=complaint):
        sweep(Path("no_such_study.py"), **options)


def test_wrong_arguments_of_a_check_end_at_once() -> None:
    with pytest.raises(SurrogateError, match=r"--scale: got 0.5, needed a number of 1 or more"):
        report_coordinates(Path("no_such_study.py"), None, 0.5, as_json=True)
    with pytest.raises(SurrogateError, match=r"--output p.pdf: needed a name"):
        report_coordinates(Path("no_such_study.py"), Path("p.pdf"), None, as_json=True)


@pytest.mark.parametrize(
    ("old", "new", "options", "complaint"),
    [
        ("Float(1e-3, 1.0, log=True)", "Categorical([0.1, 0.2])", {}, r"searches lr among \[0.1, 0.2\], and a range"),
        ("Float(1e-3, 1.0, log=True)", "Float(0.1, 0.1)", {}, "searches lr from 0.1 to 0.1, which is one value"),
        ("width_scale=4", "width_scale=1", {"num_configurations": 4}, "width_scale is 1, so there is no surrogate"),
    ],
)
def test_studies_that_cannot_be_swept_end_before_their_data_are_loaded(
    old: str, new: str, options: dict[str, Any], complaint: str, sound: Path
) -> None:
    sound.write_text(SOUND.replace(old, new).replace("def data():", "def data():\n    raise SystemExit('loaded')"))
    with pytest.raises(SurrogateError, match=complaint):
        sweep(sound, **options)


def test_drift_is_measured_between_the_minima() -> None:
    lrs = (1.0, 2.0, 4.0, 8.0)
    parabola = WidthSweep(1, "mup", lrs, (2.0, 1.0, 1.0, 2.0))
    edge = WidthSweep(2, "mup", lrs, (4.0, 3.0, 2.0, 1.0))
    assert parabola.best_lr == pytest.approx(2**1.5)
    assert edge.best_lr == 8
    assert drift_octaves([parabola, edge]) == pytest.approx(1.5)


def test_minima_at_the_edge_and_missing_ones_are_said() -> None:
    lrs, inf = (1.0, 2.0, 4.0), float("inf")
    inside = WidthSweep(1, "mup", lrs, (2.0, 1.0, 2.0))
    edge = WidthSweep(2, "mup", lrs, (3.0, 2.0, 1.0))
    nothing = WidthSweep(4, "standard", lrs, (inf, inf, inf))
    assert nothing.best_lr is None
    assert drift_octaves([inside, edge, nothing]) == pytest.approx(1)
    assert math.isnan(drift_octaves([inside, nothing]))
    at_edge, diverged = edge_notes([inside, edge, nothing])
    assert "S=2 with muP: the best learning rate 4 is at the edge of the range 1 to 4" in at_edge
    assert "S=4 without muP: every learning rate diverged" in diverged


def test_a_sweep_leaves_out_what_cannot_be_built(tmp_path: Path) -> None:
    path = tmp_path / "traced.py"
    path.write_text(SOUND.replace("build=build", "build=build(1)").replace("width_scale=4", "width_scale=1"))
    found = json.loads(sweep(path, scales=[1, 1.5, 2], num_lrs=2, num_steps=1))
    assert {each["width_scale"] for each in found["sweeps"]} == {1, 2}
    assert any(text.startswith("S=1.5 is left out: ") for text in found["warnings"])
    with pytest.raises(SurrogateError, match=r"no width to sweep can be built \(S=1.5: .*--scales"):
        sweep(path, scales=[1, 1.5])


def test_kendall_tau_and_regret() -> None:
    inf = float("inf")
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [30, 20, 10]) == -1
    assert kendall_tau([1, 2, 3, inf], [1, 3, 2, float("nan")]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1], [1, 2]) == 0
    assert regret_at(1, [1, 2, 3], [0.5, 0.4, 0.9]) == pytest.approx(0.1)
    assert regret_at(2, [1, 2, 3], [0.5, 0.4, 0.9]) == 0
