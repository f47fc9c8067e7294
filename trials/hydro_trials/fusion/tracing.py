"""Turns a module into a program on values of all lanes, by torch.fx; refuses what it cannot prove to mean the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import sites
from hydro_trials.fusion.folding import SHARED, Value
from hydro_trials.fusion.lane_modules import ALIASING_MODULES, DRAWING_MODULES, MODULES
from hydro_trials.fusion.lane_ops import Pass
from hydro_trials.fusion.lane_tables import (
    ATTRIBUTES,
    DRAWS,
    FRESH_FUNCTIONS,
    FUNCTIONS,
    METHODS,
    is_in_place,
    reads_shape,
)
from hydro_trials.surrogate.surrogate import _ScaleInput

_RUN = "lane_pass"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class LaneGraph:
    """A module's forward, as it is in its present mode (training or evaluation), on values of all lanes.

    Args:
        module: One lane's model.
        boundaries: Modules behind which the gate is asked, in the order of their numbers.

    Raises:
        FusionError: The model has something that is not known to mean the same here: names it, and its module.
    """

    def __init__(self, module: nn.Module, boundaries: Iterable[nn.Module]) -> None:
        numbers = {id(part): number for number, part in enumerate(boundaries)}
        before = _plain_state(module)
        graph = _trace(module, numbers)
        changed = [name for name, value in _plain_state(module).items() if before.get(name) != value]
        if changed:
            raise FusionError(f"the fast path cannot run a model whose forward changes its attribute {changed[0]}")
        self.draws = False
        """Whether a pass may draw random numbers."""
        self._names = state_names(module)
        self._module = module
        self._rewrite(graph)
        self.run: fx.GraphModule = fx.GraphModule(nn.Module(), graph)
        """Called with a `Pass` and what the model takes."""

    def _rewrite(self, graph: fx.Graph) -> None:
        """Put lane-aware handlers in the place of what the graph calls."""
        nodes = list(graph.nodes)
        for node in nodes:
            if node.op != "output":
                self._check_in_place(node)
        with graph.inserting_before(nodes[0]):
            run = graph.placeholder(_RUN)
        for node in nodes:
            if node.op in ("placeholder", "output"):
                continue
            handler = self._handler(node)
            with graph.inserting_before(node):
                new = graph.call_function(handler, (run, *node.args), dict(node.kwargs))
            new.meta.update(node.meta)
            new.meta["what"] = _describe(node)
            node.replace_all_uses_with(new)
            graph.erase_node(node)

    def _handler(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "get_attr":
            return self._state_handler(str(node.target))
        if node.op == "call_module":
            return self._module_handler(node)
        if node.op == "call_method":
            handler = METHODS.get(str(node.target))
        else:
            assert callable(node.target)
            if isinstance(node.target, partial):  # a boundary
                return node.target
            handler = FUNCTIONS.get(node.target)
            self.draws |= node.target in DRAWS
            if node.target is getattr and node.args[1] not in ATTRIBUTES:
                handler = None
        if handler is None:
            raise _unknown(node)
        return _named(handler)

    def _state_handler(self, target: str) -> Callable[..., Any]:
        name = self._names.get(target)
        if name is not None:
            return _named(lambda run: run.value(name))
        constant: Any = self._module
        for part in target.split("."):
            constant = getattr(constant, part)
        if not isinstance(constant, Tensor):
            raise FusionError(f"the fast path does not know attribute {target}, a {type(constant).__name__}")
        value = constant
        return _named(lambda run: Value(value, SHARED, run.num_lanes))

    def _module_handler(self, node: fx.Node) -> Callable[..., Any]:
        target = str(node.target)
        module = self._module.get_submodule(target)
        maker = MODULES.get(type(module))
        if maker is None or len(node.args) != 1 or node.kwargs or "forward" in module.__dict__:
            raise _unknown(node)
        own = [*module._parameters, *module._buffers]
        names = {name: self._names[f"{target}.{name}"] for name in own if f"{target}.{name}" in self._names}
        self.draws |= type(module) in DRAWING_MODULES and module.training
        try:
            return _named(maker(module, names))
        except FusionError as error:
            raise FusionError(f"{error}, in module {target}") from error

    def _check_in_place(self, node: fx.Node) -> None:
        """What is done in place here is done out of place: so nothing may look at the old value afterwards."""
        is_writing = node.op != "get_attr" and is_in_place(node.target, node.kwargs)
        if node.op == "call_module":
            is_writing = bool(getattr(self._module.get_submodule(str(node.target)), "inplace", False))
        if is_writing and not (node.all_input_nodes and self._is_sole_use(node.all_input_nodes[0], node)):
            raise FusionError(f"the fast path cannot run {_describe(node)}: it changes in place what is used elsewhere")

    def _is_sole_use(self, source: fx.Node, user: fx.Node) -> bool:
        if source.op in ("placeholder", "get_attr") or [n for n in source.users if not reads_shape(n)] != [user]:
            return False
        is_fresh = source.op == "call_function" and source.target in FRESH_FUNCTIONS
        if source.op == "call_module":
            is_fresh = type(self._module.get_submodule(str(source.target))) not in ALIASING_MODULES
        if source.op == "call_method" and str(source.target) == "clone":
            is_fresh = True
        return is_fresh or all(self._is_sole_use(before, source) for before in source.all_input_nodes)


def state_names(module: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer, to the first name of the same tensor: tied ones have several."""
    first: dict[int, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True
    trace_asserts = True

    def __init__(self, numbers: Mapping[int, int]) -> None:
        super().__init__()
        self._numbers = numbers
        self._path: list[str] = []

    @property
    def where(self) -> str:
        """The module being traced, in words."""
        return f"module {self._path[-1]}" if self._path else "the model's forward"

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        self._path.append(f"{name} ({type(m).__name__})")
        _check_hooks(m, name)
        if self.is_leaf_module(m, name):
            for hook in m._forward_pre_hooks.values():
                args = hook(m, args)
        output = super().call_module(m, forward, args, kwargs)
        output = self.bounded(m, output)
        self._path.pop()
        return output

    def bounded(self, module: nn.Module, output: Any) -> Any:
        """The output, with the gate asked behind it if the module is a boundary."""
        number = self._numbers.get(id(module))
        if number is None:
            return output
        marker = _named(partial(_boundary, number))
        is_proxy = isinstance(output, fx.Proxy)
        proxy = self.create_proxy("call_function", marker, (output if is_proxy else None,), {})
        return proxy if is_proxy else output

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["module"] = self.where
        return node


class _NoDraws(TorchFunctionMode):
    """Tracing would freeze what is drawn without a tensor of the model's among the arguments."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _DRAWING:
            raise FusionError(
                f"the fast path does not know {name}, which draws random numbers, in {self._tracer.where}"
            )
        return func(*args, **(kwargs or {}))


_DRAWING = {"rand", "randn", "randint", "randperm", "bernoulli", "normal", "multinomial", "poisson", "rand_like"}
_DRAWING |= {"randn_like", "randint_like", "bernoulli_", "normal_", "uniform_", "exponential_", "random_"}


def _trace(module: nn.Module, numbers: Mapping[int, int]) -> fx.Graph:
    tracer = _Tracer(numbers)
    _check_hooks(module, "")
    try:
        with _NoDraws(tracer):
            graph = tracer.trace(module)
    except FusionError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise FusionError(f"the fast path cannot trace {tracer.where} ({type(error).__name__}: {reason})") from error
    output = next(node for node in graph.nodes if node.op == "output")
    if id(module) in numbers:
        result = output.args[0] if isinstance(output.args[0], fx.Node) else None
        with graph.inserting_before(output):
            marker = graph.call_function(_named(partial(_boundary, numbers[id(module)])), (result,))
        if result is not None:
            output.args = (marker,)
    scales = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _ScaleInput)]
    if scales:
        first = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(first):
            scaled = graph.call_function(torch.mul, (first, scales[0].factor))
        first.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        scales[0].num_calls += 1
    return graph


def _boundary(number: int, run: Pass, output: Any) -> Any:
    """Ask the gate; and again when the gradient of this output is known."""
    if not torch.is_grad_enabled():
        run.check(sites.in_evaluation(number))
        return output
    run.check(sites.after_forward(number))
    if type(output) is Value and output.tensor.requires_grad:
        check, site = run.check, sites.in_backward(number)

        def hook(gradient: Tensor) -> None:
            check(site)

        output.tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    return output


def _check_hooks(module: nn.Module, name: str) -> None:
    hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
    foreign = [hook for hook in hooks if not isinstance(hook, _ScaleInput)]
    if foreign:
        what = getattr(foreign[0], "__qualname__", type(foreign[0]).__name__)
        where = f"module {name} ({type(module).__name__})" if name else "the model"
        raise FusionError(f"the fast path does not know the hook {what} on {where}")


def _describe(node: fx.Node) -> str:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if target is getattr:
        name = f"attribute {node.args[1]}"
    return f"{name} (node {node.name}) in {node.meta.get('module', 'the model')}"


def _unknown(node: fx.Node) -> FusionError:
    return FusionError(f"the fast path does not know {_describe(node)}; the general path runs it")


def _plain_state(module: nn.Module) -> dict[str, Any]:
    """Numbers and words that modules keep as attributes."""
    return {
        f"{name}.{key}": value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, (int, float, str, bool)) or value is None
    }


def _named(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler under a name that the graph's code can call it by."""
    named = partial(handler)
    named.__name__ = getattr(handler, "__name__", "handler").strip("<>")  # type: ignore[attr-defined]
    named.__module__ = __name__
    return named
