"""Numbers of the boundaries between quanta.

The gate estimates the quanta that begin at each site apart, so that one long operation does not make it careful
everywhere.
"""

STEP, FORWARD, BACKWARD, FLATTEN, UPDATE, UPDATE_MORE, EVALUATE, MEASURE, ADMIT, SAVE = range(10)
"""What begins at a boundary that belongs to no module: a step's batch, its forward pass, …"""

_FIRST_MODULE = 16


def after_forward(module: int) -> int:
    """Behind the forward pass of a module, by its number."""
    return _FIRST_MODULE + 3 * module


def in_backward(module: int) -> int:
    """Where the gradient of a module's output is known."""
    return _FIRST_MODULE + 3 * module + 1


def in_evaluation(module: int) -> int:
    """Behind a module's forward pass on validation samples."""
    return _FIRST_MODULE + 3 * module + 2
