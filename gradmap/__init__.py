"""Layer pruning and deployment of causal language models.

    from gradmap import evaluate, export, heal, load_plan, open_checkpoint, prune

What is named here is imported when it is first used, for it needs torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.api import export
    from gradmap.api import evaluate, heal, load_plan, prune
    from gradmap.model.checkpoint import open_checkpoint

__all__ = ["evaluate", "export", "heal", "load_plan", "open_checkpoint", "prune"]

_HOMES = {
    "evaluate": "gradmap.api",
    "export": "export.api",
    "heal": "gradmap.api",
    "load_plan": "gradmap.api",
    "open_checkpoint": "gradmap.model.checkpoint",
    "prune": "gradmap.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradmap' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
