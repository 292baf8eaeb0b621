"""The layers of a small model, run one by one while what its modules do is watched and changed; and
what its checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from gradmap.model.kinds import layer_lists
from gradmap.model.small_model import NotPrunableError, saved

# Of float64: what two ways to compute the same differ by at most, as a share of it.
EXACT = 1e-9
# Some parts of many families are float32 whatever they are given, such as norms: 2^-24, in some
# hundred steps.
FLOAT32 = 1e-5


@dataclass(frozen=True)
class Call:
    """A module that ran: its path inside the layer, what entered it and what left it; and whether
    it returned something beside that."""

    path: str
    given: Tensor
    made: Tensor
    more: bool


@dataclass(frozen=True)
class LayerRun:
    """A layer of a small model with what the model gives to it: the hidden state (B, T, d) and the
    other arguments."""

    layer: nn.Module
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaving(
        self, hidden: Tensor | None = None, changed: Mapping[str, Callable[[Tensor], Tensor]] = {}
    ) -> Tensor:
        """What leaves the layer, (B, T, d); with the outputs of some modules changed, by path."""
        with ExitStack() as hooks:
            for path, change in changed.items():
                module = self.layer.get_submodule(path)
                hooks.callback(module.register_forward_hook(_changing(change)).remove)
            leaving: Tensor = _first(self.layer(self._or_own(hidden), *self.args, **self.kwargs))
        return leaving

    def calls(
        self, hidden: Tensor | None = None, changed: Mapping[str, Callable[[Tensor], Tensor]] = {}
    ) -> list[Call]:
        """All modules inside it that ran and take and make a tensor, in the order in which they
        ended."""
        calls: list[Call] = []

        def noting(path: str) -> Callable[..., None]:
            def on_forward(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                given = next((a for a in (*args, *kwargs.values()) if _is_states(a)), None)
                made = _first(output)
                if given is not None and _is_states(made):
                    calls.append(Call(path, given.clone(), made.clone(), made is not output))

            return on_forward

        with ExitStack() as hooks:
            for path, module in self.layer.named_modules():
                if path:
                    hook = module.register_forward_hook(noting(path), with_kwargs=True)
                    hooks.callback(hook.remove)
            self.leaving(hidden, changed)
        return calls

    def _or_own(self, hidden: Tensor | None) -> Tensor:
        return (self.hidden if hidden is None else hidden).clone()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _is_states(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (2, 3)


def _changing(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def on_forward(module: nn.Module, args: Any, output: Any) -> Any:
        changed = change(_first(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return on_forward


def is_same(a: Tensor, b: Tensor, tolerance: float = EXACT) -> bool:
    """Whether two tensors hold the same numbers, as far as float64 can tell; shapes do not
    count."""
    return a.numel() == b.numel() and bool(
        (a.flatten() - b.flatten()).norm() <= tolerance * b.norm().clamp(min=1e-30)
    )


def find_layer_list(model: nn.Module, layers: int, input_ids: Tensor) -> str:
    """The path of the list of so many modules that run one after the other. Raises
    NotPrunableError."""
    lists = layer_lists(model, layers)
    ran: set[nn.Module] = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        ran.add(module)

    with ExitStack() as hooks:
        for module in chain.from_iterable(lists.values()):
            hooks.callback(module.register_forward_hook(note).remove)
        model(input_ids=input_ids, use_cache=False)
    running = [path for path, modules in lists.items() if ran.issuperset(modules)]
    if len(running) != 1:
        raise NotPrunableError(f"it runs {len(running)} lists of {layers} layers, not one")
    return running[0]


def runs_of_layers(model: nn.Module, layers: str, input_ids: Tensor) -> list[LayerRun]:
    """Each layer, with what the model gives to it. Raises NotPrunableError."""
    runs: list[LayerRun] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            runs.append(LayerRun(layer, args[0].clone(), args[1:], kwargs))

    with ExitStack() as hooks:
        for layer in model.get_submodule(layers).children():
            hook = layer.register_forward_pre_hook(note, with_kwargs=True)
            hooks.callback(hook.remove)
        model(input_ids=input_ids, use_cache=False)
    if not runs:
        raise NotPrunableError(
            "it gives its layers the hidden state by name, not in the first place"
        )
    return runs


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, and the path of the parameter that it holds. stacked: whether it
    holds the matrices of several experts."""

    name: str
    parameter: str
    stacked: bool


def stored_tensors(model: Any) -> list[Stored]:
    """What transformers writes of a model. The model's weights are lost."""
    parameters = dict(enumerate(model.named_parameters(), start=1))
    for number, (_, parameter) in parameters.items():
        parameter.fill_(number)
    tensors = saved(model).tensors
    held = {name: int(tensor.flatten()[0]) for name, tensor in tensors.items()}
    return [
        Stored(name, parameters[number][0], tensors[name].dim() > 2)
        for name, number in held.items()
        if number in parameters
    ]
