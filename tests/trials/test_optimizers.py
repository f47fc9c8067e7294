"""Optimizers of many lanes: each lane equals torch.optim alone, bit-equal in any company."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_slurm.errors import FusionError, StudyError, SurrogateError
from hydro_trials.fusion import FusedTrainer
from hydro_trials.fusion.layout import FlatLayout
from hydro_trials.fusion.optimizers import FusedOptimizer, LaneSettings, slot_names
from hydro_trials.fusion.streams import SampleStream, derive_seed
from hydro_trials.hyperparameters import OPTIMIZER_DEFAULTS, resolve_hyperparameters, used_hyperparameters
from hydro_trials.surrogate import ParamRule, make_surrogate, param_rules

MakeStudy = Callable[..., hydro.Study]
Values = dict[str, Any]

KINDS = list(OPTIMIZER_DEFAULTS)

LANES: dict[str, list[Values]] = {
    "sgd": [
        {"lr": 0.1},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
        {"lr": 0.05, "momentum": 0.5, "dampening": 0.3},
        {"lr": 0.02, "momentum": 0.8, "dampening": 1.0, "weight_decay": 0.1, "clip_norm": 1.0},
        {"lr": 0.02, "dampening": 0.5, "clip_value": 0.1},
        {"lr": 0.01, "momentum": 0.99, "nesterov": 1, "clip_norm": 3.0, "clip_value": 0.4},
    ],
    "adam": [
        {"lr": 1e-2},
        {"lr": 1e-3, "beta1": 0.5, "beta2": 0.9, "weight_decay": 0.1, "eps": 1e-3},
        {"lr": 1e-2, "amsgrad": True, "beta2": 0.8},
        {"lr": 3e-2, "amsgrad": 1, "weight_decay": 0.3, "clip_norm": 0.5},
        {"lr": 3e-2, "beta1": 0.0, "beta2": 0.0, "eps": 0.1, "clip_value": 0.2},
    ],
    "adamw": [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-2},
        {"lr": 1e-1, "weight_decay": 0.3, "amsgrad": True, "beta2": 0.7},
        {"lr": 1e-2, "weight_decay": 0.3, "clip_norm": 0.5, "clip_value": 0.1},
    ],
    "rmsprop": [
        {"lr": 1e-2},
        {"lr": 1e-2, "alpha": 0.5, "eps": 1e-3, "weight_decay": 0.1},
        {"lr": 1e-2, "momentum": 0.9},
        {"lr": 1e-3, "centered": True, "alpha": 0.9},
        {"lr": 1e-3, "centered": 1, "momentum": 0.5, "weight_decay": 0.2, "clip_norm": 0.5},
        {"lr": 1e-2, "alpha": 0.0, "eps": 1.0, "clip_value": 0.3},
    ],
    "adagrad": [
        {"lr": 0.1},
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1},
        {"lr": 0.3, "initial_accumulator_value": 0.5, "eps": 1e-2},
        {"lr": 0.3, "initial_accumulator_value": 3.0, "lr_decay": 1e-3, "clip_norm": 0.2},
    ],
    "lion": [
        {"lr": 1e-2},
        {"lr": 1e-3, "weight_decay": 1.0},
        {"lr": 1e-2, "beta1": 0.5, "beta2": 0.5, "clip_norm": 0.5},
        {"lr": 3e-3, "beta1": 0.95, "beta2": 0.98, "weight_decay": 0.3, "clip_value": 0.1},
        {"lr": 3e-3, "beta1": 0.0, "beta2": 0.0},
    ],
}


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. (2023), one parameter after the other."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                update = torch.sign(beta1 * mean + (1 - beta1) * gradient)
                parameter.copy_(parameter - group["lr"] * (update + group["weight_decay"] * parameter))
                mean.copy_(beta2 * mean + (1 - beta2) * gradient)


def torch_optimizer(kind: str, parameters: Iterable[Any], values: Mapping[str, float]) -> torch.optim.Optimizer:
    """The separate optimizer of one lane."""
    names = set(values) & set(OPTIMIZER_DEFAULTS[kind]) - {"beta1", "beta2", "clip_norm", "clip_value"}
    given: Values = {name: values[name] for name in names}
    given |= {name: bool(given[name]) for name in ("nesterov", "amsgrad", "centered") if name in given}
    if "beta1" in values:
        given["betas"] = (values["beta1"], values["beta2"])
    if kind == "lion":
        return Lion(parameters, {"lr": values["lr"], **given})
    makers = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }
    return makers[kind](parameters, lr=values["lr"], **given)  # type: ignore[no-any-return]


def torch_clip(parameters: Sequence[Tensor], values: Mapping[str, float]) -> None:
    if values["clip_norm"]:
        nn.utils.clip_grad_norm_(parameters, values["clip_norm"])
    if values["clip_value"]:
        nn.utils.clip_grad_value_(parameters, values["clip_value"])


def resolve(kind: str, values: Values) -> dict[str, float]:
    return resolve_hyperparameters(kind, "constant", {}, values)


def used_by(kind: str, lanes: Sequence[Values]) -> frozenset[str]:
    return used_hyperparameters(kind, {}, [name for lane in lanes for name in lane])


class Bundle:
    """What a trainer does with an optimizer, without a model."""

    def __init__(
        self,
        kind: str,
        used: Iterable[str],
        *,
        sizes: tuple[int, int] = (7, 5),
        dtype: torch.dtype = torch.float64,
        scale: float = 1.0,
    ) -> None:
        self.layout = FlatLayout.of(nn.Linear(*sizes).to(dtype))
        self.rules = param_rules({"weight": "hidden", "bias": "input"}, scale, kind)
        self.optimizer = FusedOptimizer(kind, "constant", 100, self.layout, self.rules, list(used))
        self.flat_FP = torch.zeros(0, self.layout.row_size, dtype=dtype)
        self.slots = {name: torch.zeros_like(self.flat_FP) for name in self.optimizer.slot_names}
        self.keys: list[int] = []
        self.lanes: list[LaneSettings] = []

    def admit(self, key: int, values: dict[str, float]) -> None:
        first = self.optimizer.initial_slots(values)
        generator = torch.Generator().manual_seed(1000 + key)
        start = {name: torch.randn(shape, generator=generator) for name, shape in self.layout.shapes.items()}
        row_1P = self.layout.pack(start).unsqueeze(0)
        self.flat_FP = torch.cat([self.flat_FP, row_1P])
        for name, value in first.items():
            self.slots[name] = torch.cat([self.slots[name], torch.full_like(row_1P, value)])
        self.keys.append(key)
        self.lanes.append(LaneSettings(0, values))

    def drop(self, keys: set[int]) -> None:
        rows = [row for row, key in enumerate(self.keys) if key not in keys]
        kept = torch.tensor(rows, dtype=torch.long)
        self.flat_FP = self.flat_FP.index_select(0, kept)
        self.slots = {name: slot_FP.index_select(0, kept) for name, slot_FP in self.slots.items()}
        self.keys, self.lanes = [self.keys[row] for row in rows], [self.lanes[row] for row in rows]

    def gradients(self, key: int, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_000 + 1000 * key + step)
        return {name: torch.randn(shape, generator=generator) for name, shape in self.layout.shapes.items()}

    def step(self, spoil: Mapping[int, float] | None = None) -> None:
        rows = [self.layout.pack(self.gradients(k, lane.step)) for k, lane in zip(self.keys, self.lanes, strict=True)]
        for key, value in (spoil or {}).items():
            rows[self.keys.index(key)][3] = value
        self.optimizer.update(self.flat_FP, torch.stack(rows), self.slots, self.lanes)
        self.lanes = [LaneSettings(lane.step + 1, lane.values) for lane in self.lanes]

    def row(self, key: int) -> list[Tensor]:
        at = self.keys.index(key)
        return [self.flat_FP[at], *(slot_FP[at] for slot_FP in self.slots.values())]

    def expected(self, kind: str, key: int) -> dict[str, Tensor]:
        """The lane's parameters as torch.optim alone makes them."""
        lane = self.lanes[self.keys.index(key)]
        generator = torch.Generator().manual_seed(1000 + key)
        parameters = {
            name: torch.randn(shape, generator=generator).to(self.layout.dtype).requires_grad_()
            for name, shape in self.layout.shapes.items()
        }
        optimizer = torch_optimizer(kind, parameters.values(), lane.values)
        for step in range(lane.step):
            for name, gradient in self.gradients(key, step).items():
                parameters[name].grad = gradient.to(self.layout.dtype)
            torch_clip(list(parameters.values()), lane.values)
            optimizer.step()
        return {name: parameter.detach() for name, parameter in parameters.items()}

    def assert_like_torch(self, kind: str) -> None:
        for row, key in enumerate(self.keys):
            found = self.layout.unpack(self.flat_FP[row])
            for name, expected in self.expected(kind, key).items():
                assert_close(found[name], expected)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-9 of the tensor's largest value."""
    assert expected.isfinite().all()
    assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_lanes_that_come_and_go_equal_torch_in_float64(kind: str) -> None:
    """Each lane starts at another step; some leave half-way; the others keep their state."""
    lanes = [resolve(kind, values) for values in LANES[kind]]
    bundle = Bundle(kind, used_by(kind, LANES[kind]))
    for key, values in enumerate(lanes):
        bundle.admit(key, values)
        bundle.step()
        bundle.step()
    for _ in range(20):
        bundle.step()
    bundle.assert_like_torch(kind)
    bundle.drop({0, 2})
    for _ in range(40):
        bundle.step()
    bundle.admit(0, lanes[0])
    for _ in range(5):
        bundle.step()
    assert [lane.step for lane in bundle.lanes][-2:] == [65 + 2, 5]
    bundle.assert_like_torch(kind)


@pytest.mark.parametrize(("kind", "values"), [(kind, values) for kind in KINDS for values in LANES[kind]])
def test_a_study_that_needs_less_computes_the_same(kind: str, values: Values) -> None:
    """With only the state and the work that this lane's hyperparameters need."""
    bundle = Bundle(kind, used_hyperparameters(kind, values, ()))
    bundle.admit(0, resolve(kind, values))
    for _ in range(50):
        bundle.step()
    bundle.assert_like_torch(kind)


_DRAWN: dict[str, st.SearchStrategy[Any]] = {
    "momentum": st.just(0.0) | st.floats(0.1, 0.99),
    "dampening": st.just(0.0) | st.floats(0, 1),
    "weight_decay": st.just(0.0) | st.floats(1e-4, 0.5),
    "eps": st.sampled_from([1e-8, 1e-4, 0.1]),
    "alpha": st.floats(0.3, 0.999),
    "lr_decay": st.just(0.0) | st.floats(0, 1),
    "initial_accumulator_value": st.just(0.0) | st.floats(1e-3, 5),
    "clip_norm": st.just(0.0) | st.floats(0.1, 10),
    "clip_value": st.just(0.0) | st.floats(0.05, 2),
    **dict.fromkeys(("beta1", "beta2"), st.just(0.0) | st.floats(0.1, 0.999)),
    **dict.fromkeys(("nesterov", "amsgrad", "centered"), st.booleans()),
}


def lane_values(kind: str) -> st.SearchStrategy[Values]:
    drawn = {name: _DRAWN[name] for name in OPTIMIZER_DEFAULTS[kind]}

    def allowed(values: Values) -> Values:
        if values.get("nesterov") and (not values["momentum"] or values["dampening"]):
            values["nesterov"] = False
        return values

    return st.fixed_dictionaries({"lr": st.floats(1e-4, 0.1), **drawn}).map(allowed)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_lanes_equal_torch_in_float64(kind: str, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(lane_values(kind), min_size=1, max_size=4))
    bundle = Bundle(kind, used_by(kind, drawn), sizes=(3, 2))
    for key, values in enumerate(drawn):
        bundle.admit(key, resolve(kind, values))
        bundle.step()
    for _ in range(50):
        bundle.step()
    bundle.assert_like_torch(kind)


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trains_as_with_torch_in_float64(
    make_study: MakeStudy, data64: hydro.Data, kind: str, scale: int
) -> None:
    """At every width: the rules' factors go to torch as parameter groups, and scale `clip_value` by the gradients."""

    def build(width: float) -> nn.Module:
        size = round(16 * width)
        layers = [nn.Linear(12, size), nn.Tanh(), nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 5)]
        return nn.Sequential(*layers).double()

    lanes = [resolve(kind, {**values, "lr": 0.1 * values["lr"]}) for values in LANES[kind][:4]]
    names = {name for values in LANES[kind] for name in values}
    space = {name: hydro.Categorical([lane[name] for lane in lanes]) for name in names}
    study = make_study(build=build, optimizer=kind, space=space, data_order="per_trial")
    surrogate = make_surrogate(build, scale, kind)
    trainer = FusedTrainer(study, surrogate, data64, 50, lambda site: None)
    for trial, values in enumerate(lanes):
        if kind == "adagrad":  # what a lane's accumulator begins with is tested without a trainer
            values["initial_accumulator_value"] = 0.0
        trainer.admit(trial, trial, values)
    for _ in range(50):
        trainer.step()
    for trial, values in enumerate(lanes):
        model = surrogate.make(derive_seed(trial, "init"))
        groups: list[Values] = []
        for name, parameter in model.named_parameters():
            rule = surrogate.rules[name]
            group: Values = {"params": [parameter], "lr": values["lr"] * rule.lr, "rule": rule}
            group["weight_decay"] = values["weight_decay"] * rule.weight_decay
            if "eps" in values:
                group["eps"] = values["eps"] * rule.eps
            groups.append(group)
        optimizer = torch_optimizer(kind, groups, values)
        stream = SampleStream(trial, len(data64.train[0]), study.batch_size)
        for step in range(50):
            index = stream.indices(step)
            optimizer.zero_grad()
            study.loss(model(data64.train[0][index]), data64.train[1][index]).backward()
            torch_clip(list(model.parameters()), {**values, "clip_value": 0})
            for group in groups:
                torch_clip(group["params"], {"clip_norm": 0, "clip_value": values["clip_value"] * group["rule"].eps})
            optimizer.step()
        found = trainer.state(trial).parameters
        for name, parameter in model.named_parameters():
            assert_close(found[name], parameter.detach())


@pytest.mark.parametrize("rows", [range(9), [3, 1], [5], [0]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lane_is_bit_equal_in_any_company(kind: str, rows: Sequence[int]) -> None:
    """Any number, any order; also beside lanes that are not finite, whose rows touch no other."""
    values = [resolve(kind, LANES[kind][key % len(LANES[kind])]) for key in range(9)]
    used = used_by(kind, LANES[kind])
    full, few = (Bundle(kind, used, sizes=(140, 61), dtype=torch.float32, scale=2) for _ in range(2))
    for key in range(9):
        full.admit(key, values[key])
    for key in rows:
        few.admit(key, values[key])
    for step in range(6):
        full.step({7: float("nan"), 8: float("inf")} if step == 2 and 7 not in rows else None)
        few.step()
    for key in rows:
        for found, expected in zip(few.row(key), full.row(key), strict=True):
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        assert few.row(key)[0].isfinite().all()
    if 7 not in rows:
        assert not full.row(7)[0].isfinite().all() or kind == "lion"


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_stays_on_the_device_of_the_parameters(kind: str) -> None:
    """On meta tensors any look at a value, and any mix with another device, is an error."""
    bundle = Bundle(kind, used_by(kind, LANES[kind]), scale=4)
    for key, values in enumerate(LANES[kind]):
        bundle.admit(key, resolve(kind, values))
    bundle.step()
    flat_FP = bundle.flat_FP.to("meta")
    slots = {name: slot_FP.to("meta") for name, slot_FP in bundle.slots.items()}
    bundle.optimizer.update(flat_FP, torch.empty_like(flat_FP), slots, bundle.lanes)
    bundle.step()


def test_numbers_are_as_precise_as_the_parameters_not_as_the_model() -> None:
    """A model in bfloat16 whose parameters are kept in float32."""
    layout = FlatLayout.of(nn.Linear(3, 2).bfloat16())
    rules = {name: ParamRule("hidden", lr=1 / 3) for name in layout.shapes}
    optimizer = FusedOptimizer("sgd", "constant", 10, layout, rules, used=())
    flat_FP = torch.zeros(1, layout.row_size)
    optimizer.update(flat_FP, torch.ones_like(flat_FP), {}, [LaneSettings(0, resolve("sgd", {"lr": 0.1}))])
    torch.testing.assert_close(flat_FP[0, :6], torch.full((6,), -0.1 / 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["adam", "adamw", "rmsprop", "adagrad"])
def test_eps_0_leaves_the_gaps_between_parameters_finite(kind: str) -> None:
    bundle = Bundle(kind, used_by(kind, [{}]))
    bundle.admit(0, resolve(kind, {"lr": 0.1, "eps": 0}))
    bundle.admit(1, resolve(kind, {"lr": 0.1}))
    for _ in range(3):
        bundle.step()
    assert bundle.flat_FP.isfinite().all()
    bundle.assert_like_torch(kind)


@pytest.mark.parametrize(
    ("kind", "fixed", "searched", "slots"),
    [
        ("sgd", {}, ["lr"], ()),
        ("sgd", {"momentum": 0.9}, ["lr"], ("momentum",)),
        ("sgd", {"momentum": 0}, ["lr", "weight_decay"], ()),
        ("sgd", {}, ["lr", "momentum"], ("momentum",)),
        ("adam", {}, ["lr"], ("mean", "mean_square")),
        ("adam", {"amsgrad": False}, ["lr"], ("mean", "mean_square")),
        ("adamw", {"amsgrad": True}, ["lr"], ("mean", "mean_square", "max_square")),
        ("adam", {}, ["lr", "amsgrad"], ("mean", "mean_square", "max_square")),
        ("rmsprop", {}, ["lr"], ("mean_square",)),
        ("rmsprop", {"centered": 1}, ["momentum"], ("mean_square", "mean", "momentum")),
        ("adagrad", {}, ["lr"], ("square_sum",)),
        ("lion", {}, ["lr"], ("mean",)),
    ],
)
def test_state_exists_only_where_the_study_can_use_it(
    kind: str, fixed: Values, searched: list[str], slots: tuple[str, ...]
) -> None:
    assert slot_names(kind, used_hyperparameters(kind, fixed, searched)) == slots


def test_a_lane_that_needs_what_the_study_does_not_use_is_refused_before_anything_changes() -> None:
    bundle = Bundle("sgd", ())
    bundle.admit(0, resolve("sgd", {"lr": 0.1}))
    values = resolve("sgd", {"lr": 0.1, "momentum": 0.5})
    complaint = "a lane with momentum 0.5, but the study neither searches nor fixes momentum"
    with pytest.raises(FusionError, match=re.escape(complaint)):
        bundle.admit(1, values)
    bundle.lanes = [LaneSettings(0, values)]
    before_FP = bundle.flat_FP.clone()
    with pytest.raises(FusionError, match=re.escape(complaint)):
        bundle.step()
    assert torch.equal(bundle.flat_FP, before_FP)
    with pytest.raises(FusionError, match="got optimizer 'lamb', needed one of sgd, adam"):
        FusedOptimizer("lamb", "constant", 1, bundle.layout, bundle.rules)


def test_every_lane_begins_with_its_own_accumulator() -> None:
    bundle = Bundle("adagrad", ())
    for key, value in enumerate((0.0, 0.5)):
        values = resolve("adagrad", {"lr": 0.1, "initial_accumulator_value": value})
        assert bundle.optimizer.initial_slots(values) == {"square_sum": value}
        bundle.admit(key, values)
    assert bundle.slots["square_sum"][:, 0].tolist() == [0.0, 0.5]
    assert Bundle("adam", ["amsgrad"]).optimizer.initial_slots(resolve("adam", {"lr": 0.1})) == {
        "mean": 0.0,
        "mean_square": 0.0,
        "max_square": 0.0,
    }


@pytest.mark.parametrize(
    ("kind", "values", "complaint"),
    [
        ("sgd", {"nesterov": True}, "nesterov: got momentum 0 and dampening 0, needed a momentum above 0"),
        ("sgd", {"nesterov": 1, "momentum": 0.9, "dampening": 0.1}, "dampening 0.1, needed .* no dampening"),
        ("sgd", {"nesterov": 0.5, "momentum": 0.9}, "'nesterov': got 0.5, needed True, False, 0 or 1"),
        ("sgd", {"nesterov": "yes", "momentum": 0.9}, "'nesterov': got 'yes', needed True, False, 0 or 1"),
        ("sgd", {"momentum": 1.0}, "'momentum': got 1.0, needed a number from 0 to below 1"),
        ("sgd", {"momentum": True}, "'momentum': got True"),
        ("sgd", {"dampening": 1.1}, "'dampening': got 1.1, needed a number from 0 to 1"),
        ("sgd", {"amsgrad": True}, "unknown|knows only"),
        ("sgd", {"clip_norm": -1}, "'clip_norm': got -1, needed a number of 0 or more"),
        ("lion", {"clip_value": float("inf")}, "'clip_value': got inf, needed a finite number"),
        ("adam", {"beta2": 1}, "'beta2': got 1, needed a number from 0 to below 1"),
        ("adam", {"amsgrad": 2}, "'amsgrad': got 2, needed True, False, 0 or 1"),
        ("rmsprop", {"alpha": 1}, "'alpha': got 1, needed a number from 0 to below 1"),
        ("rmsprop", {"centered": -1}, "'centered': got -1"),
        ("adagrad", {"initial_accumulator_value": -0.1}, "'initial_accumulator_value': got -0.1"),
        ("adagrad", {"lr_decay": -0.1}, "'lr_decay': got -0.1"),
        ("lion", {"eps": 1e-8}, "unknown|knows only"),
        ("lion", {"beta1": -0.1}, "'beta1': got -0.1"),
    ],
)
def test_what_an_optimizer_cannot_use_is_one_line(
    make_study: MakeStudy, kind: str, values: Values, complaint: str
) -> None:
    with pytest.raises(StudyError, match=complaint):
        make_study(optimizer=kind, fixed=values)
    with pytest.raises(StudyError, match=complaint) as raised:
        resolve(kind, {"lr": 0.1, **values})
    assert "\n" not in str(raised.value)


def test_a_space_may_hold_combinations_that_only_some_trials_cannot_have(make_study: MakeStudy) -> None:
    space = {"lr": hydro.Float(1e-3, 1), "nesterov": hydro.Categorical([False, True]), "momentum": hydro.Float(0, 0.9)}
    study = make_study(optimizer="sgd", space=space)
    assert used_hyperparameters("sgd", study.fixed, study.space) == {"lr", "nesterov", "momentum"}
    make_study(optimizer="sgd", space={**space, "nesterov": hydro.Int(0, 1)})
    with pytest.raises(StudyError, match=r"got Float, needed Categorical\(\[False, True\]\)"):
        make_study(optimizer="sgd", space={**space, "nesterov": hydro.Float(0, 1)})
    with pytest.raises(StudyError, match=r"nesterov: got momentum 0\.9 and dampening 0\.5"):
        make_study(
            optimizer="sgd",
            space={"lr": space["lr"], "momentum": space["momentum"]},
            fixed={"nesterov": True, "dampening": 0.5},
        )


@pytest.mark.parametrize(
    ("kind", "follows"), [("rmsprop", "adam"), ("adagrad", "adam"), ("lion", "adamw"), ("sgd", "sgd")]
)
def test_every_optimizer_has_a_rule_at_any_width(kind: str, follows: str) -> None:
    kinds = {"a": "input", "b": "hidden", "c": "output", "d": "fixed"}
    assert param_rules(kinds, 4, kind) == param_rules(kinds, 4, follows)
    with pytest.raises(SurrogateError, match="'lamb' has no known rule"):
        param_rules(kinds, 4, "lamb")


def test_the_initial_accumulator_means_the_same_at_every_width() -> None:
    """A surrogate's gradients are S times the target's: S times as large ones make the same steps."""
    values = resolve("adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 0.1})
    moved = []
    for scale in (1.0, 4.0):
        bundle = Bundle("adagrad", (), scale=scale)
        bundle.admit(0, values)
        before_FP, grad_FP = bundle.flat_FP.clone(), bundle.layout.pack(bundle.gradients(0, 0)).unsqueeze(0)
        bundle.optimizer.update(bundle.flat_FP, grad_FP * scale, bundle.slots, bundle.lanes)
        moved.append(bundle.layout.unpack((bundle.flat_FP - before_FP)[0]))
    torch.testing.assert_close(moved[1]["bias"], moved[0]["bias"])
    torch.testing.assert_close(moved[1]["weight"], 4 * moved[0]["weight"])
