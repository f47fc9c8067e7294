"""What a surrogate cannot answer, said aloud."""

from __future__ import annotations

from hydro_trials.study import Study

POOR_TRANSFER = {
    "weight_decay": "how much regularization a model needs grows with its size",
    "dropout": "how much regularization a model needs grows with its size",
    "augment": "a larger model profits from more augmentation",
    "label_smoothing": "how much regularization a model needs grows with its size",
    "mixup": "a larger model profits from more augmentation",
}
"""Words in names of hyperparameters that transfer poorly over width, and why."""


def poor_transfers(study: Study) -> list[str]:
    """One sentence for each searched hyperparameter whose best value on a surrogate need not be the target's.

    Source: Yang et al., Tensor Programs V (2022), section 6.1 and table 1.
    """
    if study.width_scale == 1:
        return []
    return [
        f"{name} transfers poorly over width ({reason}): either fix it (Study.fixed), or search it on the target in a "
        "second study with width_scale=1 and the winner's other hyperparameters fixed"
        for name in study.space
        for word, reason in POOR_TRANSFER.items()
        if word in name
    ]
