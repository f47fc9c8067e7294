"""Shrinks a user's model so that the best hyperparameters of the small one are the best of the large one."""

from hydro_trials.surrogate.classify import Classification, classify
from hydro_trials.surrogate.init_scale import build_seeded
from hydro_trials.surrogate.rules import ParamRule, param_rules
from hydro_trials.surrogate.surrogate import Surrogate, as_factory, check_readouts, make_surrogate, study_surrogate

__all__ = [
    "Classification",
    "ParamRule",
    "Surrogate",
    "as_factory",
    "build_seeded",
    "check_readouts",
    "classify",
    "make_surrogate",
    "param_rules",
    "study_surrogate",
]
