"""Finds how a family names its parts, by running the layers of a small model of the same kind.

What mixes positions is the attention; what runs behind it, on anything but what it made, is the
FFN. The last linear map of each is told by its output: nothing but the addition to the hidden state
may follow, which a small vector shows that is added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradmap.model.layer_runs import Call, LayerRun, is_same
from gradmap.model.norms import Norm, norm_behind
from gradmap.model.small_model import NotPrunableError

DIGITS = 9  # of a multiplier
# What is done to the outputs of modules, by path.
Changed = Mapping[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Names:
    """What was found in one layer, all paths inside it.

    attention, attention_output: the module that mixes positions, and its last linear map.
    feed_forward: the children that are of the FFN, in the order in which they run. block: the one
    of them that holds `down_projection`, its last linear map; None if all of it has no such map, as
    a mixture of experts. experts: the weights that are the last maps of its experts.
    multipliers: what the outputs of attention and FFN are multiplied with on the way to the hidden
    state; None where they pass something that is not linear. norms: what that is, if it is an RMS
    norm and nothing else.
    parallel: whether the FFN reads what the attention reads. joined: whether what leaves the
    attention or the FFN is the hidden state already. beside: see `_return_more`.
    """

    attention: str
    attention_output: str
    feed_forward: tuple[str, ...]
    block: str
    down_projection: str | None
    experts: tuple[str, ...]
    expert_biases: bool
    transposed: bool
    multipliers: tuple[float | None, float | None]
    norms: tuple[Norm | None, Norm | None]
    parallel: bool
    joined: bool
    beside: tuple[str, ...]

    @property
    def output(self) -> str:
        """What adds the FFN to the hidden state: its last map, or a whole mixture."""
        return self.block if self.down_projection is None else self.down_projection

    @property
    def weights(self) -> tuple[str, ...]:
        """Those of the last maps of the FFN."""
        if self.down_projection is None:
            return self.experts
        return (f"{self.down_projection}.weight",)


def find_names(run: LayerRun) -> Names:
    """What the parts of a layer are called. Raises NotPrunableError."""
    calls = run.calls()
    children = [call for call in calls if "." not in call.path]
    attention = _find_attention(run, children)
    attention_output = _last_linear_map(run, calls, attention.path)
    if attention_output is None:
        raise NotPrunableError(f"its attention ({attention.path}) does not end in a linear map")
    joined = not is_same(attention.made, attention_output.made)
    feed_forward = _behind(children, attention, joined)
    block = _block(run, feed_forward)
    down = _last_linear_map(run, calls, block)
    experts, biases = ((), False) if down is not None else _expert_weights(run, block)
    output = block if down is None else down.path
    silenced: Changed = {output: torch.zeros_like}
    return Names(
        attention.path,
        attention_output.path,
        tuple(dict.fromkeys(call.path for call in feed_forward)),
        block,
        None if down is None else down.path,
        experts,
        biases,
        isinstance(run.layer.get_submodule(output), Conv1D),
        (
            _multiplier(run, attention_output.path, silenced),
            _multiplier(run, output, {}),
        ),
        (
            _only_norm(run, calls, attention_output.path, silenced),
            _only_norm(run, calls, output, {}),
        ),
        _is_parallel(run, calls, attention_output.path, output),
        joined or _adds_the_hidden_state(calls, block, down),
        _return_more(run, children),
    )


def _return_more(run: LayerRun, children: Sequence[Call]) -> tuple[str, ...]:
    """The modules that return something beside what they make of the hidden state; an empty path is
    the layer."""
    leaving = run.layer(run.hidden.clone(), *run.args, **run.kwargs)
    of_layer = [""] if isinstance(leaving, tuple) else []
    return tuple(dict.fromkeys([*of_layer, *(call.path for call in children if call.more)]))


def _find_attention(run: LayerRun, children: Sequence[Call]) -> Call:
    """The child that looks at other positions: what leaves it changes where what enters did not."""
    moved = run.hidden.clone()
    moved[:, 0] += torch.randn(moved[:, 0].shape, generator=_generator(), dtype=moved.dtype)
    others = [call for call in run.calls(moved) if "." not in call.path]
    for call, other in zip(children, others, strict=True):
        if call.given.shape[:2] != moved.shape[:2]:
            continue
        if is_same(other.given[:, 1:], call.given[:, 1:]) and not is_same(
            other.made[:, 1:], call.made[:, 1:]
        ):
            _require_no_other(run, moved, call)
            return call
    raise NotPrunableError("no part of its layers looks at other positions")


def _require_no_other(run: LayerRun, moved: Tensor, attention: Call) -> None:
    """Raises NotPrunableError if another part of the layer looks at other positions too."""
    alone = run.leaving(moved, {attention.path: lambda made: attention.made})
    if not is_same(alone[:, 1:], run.leaving()[:, 1:]):
        raise NotPrunableError("more than one part of its layers looks at other positions")


def _last_linear_map(run: LayerRun, calls: Sequence[Call], inside: str) -> Call | None:
    """The one that all of a module passes: with its output silenced, the module's other weights do
    not matter."""
    width = run.hidden.shape[-1]
    maps = [
        call
        for call in calls
        if (call.path == inside or call.path.startswith(f"{inside}."))
        and isinstance(run.layer.get_submodule(call.path), nn.Linear | Conv1D)
        and call.made.shape[-1] == width
    ]
    if not maps:
        return None
    last = maps[-1]
    silenced = {last.path: torch.zeros_like}
    expected = run.leaving(changed=silenced)
    with _weights_doubled(run.layer.get_submodule(inside)):
        actual = run.leaving(changed=silenced)
    return last if is_same(actual, expected) else None


@contextmanager
def _weights_doubled(
    module: nn.Module, of_kind: Callable[[str], bool] = lambda kind: True
) -> Iterator[None]:
    """of_kind: told the last name of each."""
    changed = [weight for name, weight in module.named_parameters() if of_kind(_last_name(name))]
    try:
        for parameter in changed:
            parameter.mul_(2)
        yield
    finally:
        for parameter in changed:
            parameter.div_(2)  # a power of two: exact


def _adds_the_hidden_state(calls: Sequence[Call], block: str, down: Call | None) -> bool:
    """Whether what leaves the block is more than what its last linear map makes."""
    if down is None:
        return False
    return not is_same(_call_of(calls, block).made, down.made)


def _behind(children: Sequence[Call], attention: Call, joined: bool) -> list[Call]:
    """What runs behind the attention on anything but what the attention made."""
    place = next(place for place, call in enumerate(children) if call.path == attention.path)
    before = {call.path for call in children[: place + 1]}
    made = [] if joined else [attention.made]
    behind = []
    for call in children[place + 1 :]:
        if any(is_same(call.given, of_attention) for of_attention in made):
            made.append(call.made)
            before.add(call.path)
        elif call.path not in before:
            behind.append(call)
    return behind


def _call_of(calls: Sequence[Call], path: str) -> Call:
    return next(call for call in calls if call.path == path)


def _block(run: LayerRun, feed_forward: Sequence[Call]) -> str:
    """The last child of the FFN that holds matrices."""
    with_matrices = [
        call.path
        for call in feed_forward
        if any(weight.dim() > 1 for weight in run.layer.get_submodule(call.path).parameters())
    ]
    if not with_matrices:
        raise NotPrunableError("its layers have no FFN behind the attention")
    return with_matrices[-1]


def _expert_weights(run: LayerRun, block: str) -> tuple[tuple[str, ...], bool]:
    """The weights that the output of a mixture of experts is proportional to, and whether their
    biases are needed for it."""
    module = run.layer.get_submodule(block)
    matrices = [name for name, weight in module.named_parameters() if weight.dim() > 1]

    def made() -> Tensor:
        return _call_of(run.calls(), block).made

    twice = 2 * made()
    for kind, biases in product(dict.fromkeys(map(_last_name, matrices)), (False, True)):
        kinds = {kind, f"{kind}_bias"} if biases else {kind}
        with _weights_doubled(module, kinds.__contains__):
            is_proportional = is_same(made(), twice)
        if is_proportional:
            weights = [name for name in matrices if _last_name(name) == kind]
            return tuple(f"{block}.{name}" for name in weights), biases
    raise NotPrunableError(f"its FFN ({block}) is neither a linear map at its end nor a mixture")


def _last_name(weight: str) -> str:
    """down_proj of experts.3.down_proj.weight, and down_proj_bias of its bias."""
    return weight.removesuffix(".weight").replace(".bias", "_bias").rpartition(".")[2]


def _only_norm(run: LayerRun, calls: Sequence[Call], output: str, silenced: Changed) -> Norm | None:
    """The RMS norm that a map's output passes and that adds what it makes to the hidden state."""
    norm = norm_behind(run, calls, _call_of(calls, output).made)
    return norm if norm and _multiplier(run, norm.path, silenced) == 1 else None


def _multiplier(run: LayerRun, output: str, silenced: Changed) -> float | None:
    """What is added to a map's output is added to what leaves the layer so many times; None if it
    is not."""
    added = torch.randn(run.hidden.shape, generator=_generator(), dtype=run.hidden.dtype)
    moved = run.leaving(changed={**silenced, output: lambda made: made + added.reshape(made.shape)})
    difference = moved - run.leaving(changed=silenced)
    multiplier = float((difference * added).sum() / (added * added).sum())
    return round(multiplier, DIGITS) if is_same(difference, multiplier * added) else None


def _is_parallel(run: LayerRun, calls: Sequence[Call], attention_output: str, ffn: str) -> bool:
    """Whether what enters the FFN is the same whatever the attention makes."""

    def moving(made: Tensor) -> Tensor:
        return made + torch.randn(made.shape, generator=_generator(), dtype=made.dtype)

    moved = run.calls(changed={attention_output: moving})
    return is_same(_call_of(moved, ffn).given, _call_of(calls, ffn).given)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
