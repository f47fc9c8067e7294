"""Study files: what they may say, and one clear line where they are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import hydro_trials as hydro
from hydro_slurm import formats
from hydro_slurm.errors import HydroError, StudyError
from hydro_slurm.study.description import StudyDescription
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.planner import Limits
from hydro_trials.runtime.check import check_study
from hydro_trials.runtime.describe import describe_study
from hydro_trials.runtime.profile import profile_study
from hydro_trials.study_file import load_data, load_study

MakeStudy = Callable[..., hydro.Study]

EXAMPLE = Path(__file__).parents[2] / "trials" / "examples" / "digits_study.py"

GOOD = """
import torch
from torch import nn
import hydro_trials as hydro
from neighbour import NUM_INPUTS

print("hello from the study file")

def build(width):
    return nn.Sequential(nn.Linear(NUM_INPUTS, round(16 * width)), nn.ReLU(), nn.Linear(round(16 * width), 3))

def data():
    x = torch.randn(40, NUM_INPUTS)
    return hydro.Data(train=(x, x[:, 0] .long() % 3), valid=(x, x[:, 0].long() % 3))

study = hydro.Study(
    name="tiny", build=build, data=data, loss=nn.functional.cross_entropy, batch_size=8, steps=27, width_scale=2,
    space={"lr": hydro.Float(1e-4, 1e-1, log=True), "momentum": hydro.Categorical([0.0, 0.9])}, optimizer="sgd",
)
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "neighbour.py").write_text("NUM_INPUTS = 6\n")
        path = tmp_path / "my_study.py"
        path.write_text(text)
        return path

    return write


def run_verb(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "hydro_trials", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def test_describe_prints_one_object_that_the_control_plane_reads(study_file: Callable[[str], Path]) -> None:
    done = run_verb("describe", study_file(GOOD), "--json")
    assert done.returncode == 0, done.stderr
    assert "hello from the study file" in done.stderr
    description = formats.from_document(StudyDescription, json.loads(done.stdout), "describe")
    assert (description.name, description.width_scale, description.rungs) == ("tiny", 2.0, (1, 3, 9, 27))
    assert description.distributions() == {
        "lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "momentum": optuna.distributions.CategoricalDistribution([0.0, 0.9]),
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import no_such_module\n", "my_study.py:1: ModuleNotFoundError"),
        ("\n\ndef f(:\n", "my_study.py:3: SyntaxError"),
        ("\nraise SystemExit(3)\n", "my_study.py:2: SystemExit"),
        ("x = 1\n", "found none"),
        (GOOD + "\nother = hydro.Study(**vars(study) | {'name': 'b'})\n", "found other, study"),
        (
            GOOD.replace('"lr": hydro', '"lrr": hydro'),
            "unknown; optimizer 'sgd' with schedule 'constant' knows lr, mom",
        ),
    ],
)
def test_what_does_not_import_is_one_line_with_file_and_place(
    study_file: Callable[[str], Path], text: str, complaint: str
) -> None:
    with pytest.raises(StudyError) as raised:
        load_study(study_file(text))
    assert complaint in str(raised.value)
    assert "my_study.py" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_command_line_prints_one_line_and_nothing_on_stdout(study_file: Callable[[str], Path]) -> None:
    done = run_verb("describe", study_file("import no_such_module\n"), "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("hydro: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": "a b"}, "Study.name: got 'a b'"),
        ({"build": 3}, "Study.build: got 3, needed a function"),
        ({"space": {}}, "got nothing to search"),
        ({"space": {"momentum": hydro.Float(0, 1)}}, "'momentum'.*: unknown; optimizer 'adam'"),
        ({"space": {"lr": 0.1}}, "needed Float, Int or Categorical"),
        ({"space": {"lr": hydro.Float(0, 1)}}, "'lr': got 0.0, needed a number above 0"),
        ({"space": {"beta1": hydro.Float(0.1, 0.9)}}, "no learning rate"),
        ({"fixed": {"lr": 0.1}}, "both name 'lr'"),
        ({"fixed": {"gamma": 0.1}}, "gamma.*unknown"),
        ({"fixed": {"beta1": "big"}}, "'beta1': got 'big', needed a finite number"),
        ({"optimizer": "lamb"}, "needed one of sgd, adam, adamw"),
        ({"schedule": "linear"}, "needed one of constant, cosine, step"),
        ({"sampler": "grid"}, "needed one of tpe, random"),
        ({"direction": "up"}, "needed one of minimize, maximize"),
        ({"objective": "valid.accuracy"}, "needed one of valid.loss"),
        ({"metrics": {"loss": len}}, "give the metric another name"),
        ({"batch_size": 0}, "Study.batch_size: got 0"),
        ({"steps": 1.5}, "Study.steps: got 1.5"),
        ({"width_scale": 0.5}, "Study.width_scale: got 0.5"),
        ({"rungs": (10, 5, 40)}, "needed a number of rungs, or rising steps that end with steps=40"),
        ({"rungs": (10, 50)}, "end with steps=40"),
        ({"rungs": 0}, "Study.rungs: got 0"),
    ],
)
def test_a_field_that_cannot_work_is_named(make_study: MakeStudy, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StudyError, match=complaint):
        make_study(**fields)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (lambda: 3, "returned int"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: hydro.Data(train=(torch.ones(9), torch.ones(8)), valid=(torch.ones(9), torch.ones(9))), "9 inputs"),
        (lambda: hydro.Data(train=(torch.ones(9), [1]), valid=()), "Data.train: needed a pair"),  # type: ignore[arg-type]
        (lambda: hydro.Data(train=(torch.ones(9), torch.ones(9)), valid=(torch.ones(9),) * 2), "only 9 training"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(
    make_study: MakeStudy, data: Callable[[], Any], complaint: str
) -> None:
    with pytest.raises(StudyError, match=complaint):
        load_data(make_study(data=data))


def test_a_lane_s_hyperparameters_go_over_fixed_ones_and_defaults() -> None:
    values = resolve_hyperparameters("adam", "step", {"beta1": 0.5, "gamma": 0.3}, {"lr": 0.1, "beta2": 0.9})
    assert (values["lr"], values["beta1"], values["beta2"], values["gamma"], values["eps"]) == (
        0.1,
        0.5,
        0.9,
        0.3,
        1e-8,
    )
    with pytest.raises(StudyError, match="knows only lr, momentum"):
        resolve_hyperparameters("sgd", "constant", {}, {"lr": 0.1, "beta1": 0.5})
    with pytest.raises(StudyError, match="no learning rate"):
        resolve_hyperparameters("sgd", "constant", {}, {})


def test_check_says_what_the_surrogate_is_and_what_it_costs() -> None:
    found = json.loads(check_study(EXAMPLE, as_json=True))
    assert found["num_parameters"] == {"target": 42634, "surrogate": 4522}
    assert found["parameters"]["2.weight"]["kind"] == "hidden"
    assert found["readouts"] == ["6"]
    assert found["step_ms"] > 0
    profile = found["profile"]
    assert profile["points"][0]["lanes"] == 1
    assert profile["points"][-1]["lanes"] >= profile["knee_lanes"] >= 1
    assert 4522 * 4 * 3 < profile["lane_bytes"] < 64 << 20, "a lane holds weights and two moments at least"


def test_check_as_text_shows_parameters_and_the_profile() -> None:
    text = check_study(EXAMPLE, as_json=False)
    assert "parameters:" in text
    assert "lane steps/s" in text
    assert "knee at F=" in text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (GOOD.replace("width_scale=2", "width_scale=40"), "stay above 0"),
        (
            GOOD.replace("def build(width):", "def build(width):\n    raise ValueError('no model today')"),
            "no model today",
        ),
        (GOOD.replace("nn.functional.cross_entropy", "lambda o, t: o.no_such_thing"), "my_study.py:.*no_such_thing"),
    ],
)
def test_check_finds_what_would_fail_in_training(study_file: Callable[[str], Path], text: str, complaint: str) -> None:
    with pytest.raises(HydroError, match=complaint):
        check_study(study_file(text), as_json=True)


def test_a_profile_is_written_under_its_key(study_file: Callable[[str], Path], tmp_path: Path) -> None:
    document = json.loads(profile_study(study_file(GOOD), tmp_path, [2, 1], Limits(), target=False, as_json=True))
    assert [point["lanes"] for point in document["points"]] == [1, 2]
    assert all(point["lane_steps_per_s"] > 0 and point["peak_bytes"] > 0 for point in document["points"])
    assert json.loads((tmp_path / f"{document['key']}.json").read_text()) == document
    with pytest.raises(StudyError, match="1 or more"):
        profile_study(study_file(GOOD), None, [0], Limits(), target=False, as_json=True)


def test_describe_as_text_names_every_setting() -> None:
    text = describe_study(EXAMPLE, as_json=False)
    assert "name: digits" in text
    assert "rungs: [178, 533, 1600]" in text


NAMED_INPUTS = """
import torch
from torch import nn
import hydro_trials as hydro

class Two(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, size), nn.Linear(4, size), nn.Linear(size, 3)

    def forward(self, left, right):
        return self.head(torch.relu(self.left(left) + self.right(right)))

def build(width):
    return Two(round(64 * width))

def data():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(80, 6, generator=generator), torch.randn(80, 4, generator=generator)
    inputs, targets = {"left": left, "right": right}, left[:, :3].argmax(1)
    return hydro.Data(train=(inputs, targets), valid=(inputs, targets))

study = hydro.Study(
    name="two", build=build, data=data, loss=nn.functional.cross_entropy, optimizer="adam", width_scale=2, max_lanes=2,
    space={"lr": hydro.Float(1e-4, 1e-1, log=True), "batch_size": hydro.Categorical([8, 16])}, batch_size=8, steps=30,
)
"""


def test_a_model_with_named_inputs_goes_through_the_whole_check(study_file: Callable[[str], Path]) -> None:
    found = json.loads(check_study(study_file(NAMED_INPUTS), as_json=True))
    assert found["coordinate_check"]["problems"] == []
    assert found["separates"] == []
    assert found["profile"]["refused"].get("general") is None
