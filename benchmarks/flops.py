"""FLOPs of matrix products, counted while code runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm}


class CountedFlops(TorchDispatchMode):
    """Counts FLOPs in `total`, two for each multiplication. Fused attention's own are left out, as
    in gradmap.costs.steps.

    In inference mode, products arrive as a part of something larger (`linear`, `matmul`). So what
    is not known is taken apart, until nothing is left to take apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and packet is not torch.ops.prim.device:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if packet in _PRODUCTS:
            self.total += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


def counted(run: Callable[[], object]) -> int:
    """The FLOPs of what `run` multiplies. It runs several times as slowly."""
    counter = CountedFlops()
    with counter:
        run()
    return counter.total
