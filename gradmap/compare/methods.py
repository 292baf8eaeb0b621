"""How the methods of a comparison are written: gradient+projection, gradient-one-shot+none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradmap.common.errors import UserError
from gradmap.methods.registry import compensator_names, selector, selector_names
from gradmap.pruning.settings import ALWAYS

Variants = Mapping[str, Mapping[str, Any]]
# What may follow the name of a selector or a compensator, and which options of `gradmap prune` it
# stands for.
OF_SELECTORS: Variants = {
    "-one-shot": {"one_shot": True},
    # The layers that Shortened LLaMA keeps.
    "-protected": {"protect_first": 4, "protect_last": 2},
    "-pairs": {"unit": "pair"},
}
OF_COMPENSATORS: Variants = {"-as-published": {"accept": ALWAYS, "held_out": 0}}


@dataclass(frozen=True)
class Method:
    """A selector and a compensator, either with a variant: `gradient+projection`,
    `gradient-one-shot+none`."""

    selection: str
    repair: str

    @property
    def name(self) -> str:
        return f"{self.selection}+{self.repair}"


def parse_methods(names: Sequence[str]) -> tuple[Method, ...]:
    """gradient+projection, sleb+none -> methods. Raises UserError for an unknown one."""
    methods = []
    selectors = [name for name in selector_names() if name != "manual"]
    for name in names:
        selection, _, repair = name.partition("+")
        chosen, _ = split_variant(selection, OF_SELECTORS)
        compensator, _ = split_variant(repair, OF_COMPENSATORS)
        if chosen not in selectors or compensator not in compensator_names():
            known = f"{', '.join(selectors)}; compensators: {', '.join(compensator_names())}"
            variants = ", ".join((*OF_SELECTORS, *OF_COMPENSATORS))
            raise UserError(
                f"Method {name!r} is no SELECTOR+COMPENSATOR; selectors: {known}; variants: "
                f"{variants}."
            )
        methods.append(Method(selection, repair))
    return tuple(dict.fromkeys(methods))


def split_variant(name: str, variants: Variants) -> tuple[str, Mapping[str, Any]]:
    """`gradient-one-shot` -> `gradient`, and the options that `-one-shot` stands for."""
    for suffix, options in variants.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), options
    return name, {}


def is_nested(selection: str) -> bool:
    """Whether a selection, variant and all, of more layers serves fewer too."""
    return selector(split_variant(selection, OF_SELECTORS)[0]).nested
