"""The data plane: surrogates of a user's model, many of them fused into one program, trained in quanta behind a gate.

A study file needs only what is named here: `import hydro_trials as hydro`, then one `hydro.Study(...)`.
"""

from hydro_trials.study import Categorical, Data, Float, HuggingFace, Int, Study

__all__ = ["Categorical", "Data", "Float", "HuggingFace", "Int", "Study"]
