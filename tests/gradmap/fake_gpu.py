"""A GPU without a GPU: tensors that say they are on `cuda`, while a plain tensor on the CPU does
the work.

The numbers are real, so a test can compare them with those of the CPU. What a GPU would mind is
counted or refused: copies between the two memories, waits of the host for the GPU, operands that
are in the wrong memory, and what the CPU reads before the GPU has sent it.

torch's own FakeTensorMode has no numbers, and a build of torch without CUDA aborts in its backward
pass.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda:0")
# What torch's C++ takes a tensor's device to be. Autograd has no queue for `cuda` here, and for
# `meta` it needs none.
_STAND_IN = torch.device("meta")
_CPU = torch.device("cpu")
_aten = torch.ops.aten
# On CUDA, the host waits in these for a number that only the GPU knows: a value, a size, or whether
# all went well.
_WAITS = {
    _aten._local_scalar_dense,  # item(), bool(), int(), float()
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.bincount,
    _aten.equal,
    _aten.repeat_interleave,
    _aten._linalg_check_errors,  # cholesky, eigh, solve and their like
}
_INDEXING = {
    _aten.index,
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
    _aten._unsafe_index,
}


@dataclass(frozen=True)
class Event:
    """A copy between the memories, or a wait of the host for the GPU. where: the line of code that
    is to blame."""

    kind: str
    size_bytes: int
    where: str
    in_backward: bool


@dataclass
class Traffic:
    """What went between host and GPU. A copy waits unless it is `non_blocking`; a value that is
    read only waits."""

    events: list[Event] = field(default_factory=list)

    @property
    def copies(self) -> int:
        return sum(event.kind == "copy" for event in self.events)

    @property
    def copied_bytes(self) -> int:
        return sum(event.size_bytes for event in self.events)

    @property
    def waits(self) -> int:
        return sum(event.kind == "wait" for event in self.events)

    @property
    def waits_in_backward(self) -> int:
        return sum(event.kind == "wait" and event.in_backward for event in self.events)

    def __str__(self) -> str:
        counts = Counter((event.kind, event.where) for event in self.events)
        return "\n".join(
            f"{count:5} {kind} {where}" for (kind, where), count in sorted(counts.items())
        )


class GpuTensor(Tensor):
    """`inner`, a tensor of the CPU, on a GPU."""

    inner: Tensor  # type: ignore[assignment]  # instead of the product of that name
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_STAND_IN,
        )
        self.inner = inner.detach()
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as an instance's
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} on a GPU's tensor outside of the block of fake_gpu()")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    is_cuda = True
    is_meta = False

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({self.inner})"


class FakeGpu:
    """What `fake_gpu` yields."""

    def __init__(self) -> None:
        self._recorder = _Recorder()

    def move(self, model: nn.Module) -> nn.Module:
        """Moves a model to the GPU, in place; parameters that are shared stay so."""
        moved: dict[int, Any] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    on_gpu = moved.setdefault(
                        id(parameter), nn.Parameter(parameter.to(GPU), requires_grad=False)
                    )
                    module._parameters[name] = on_gpu
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(GPU)
        return model

    @contextmanager
    def traffic(self) -> Iterator[Traffic]:
        """Counts what happens in the block."""
        self._recorder.traffic = Traffic()
        try:
            yield self._recorder.traffic
        finally:
            self._recorder.traffic = Traffic()


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Within the block, `cuda` can be computed on, and has 1 GiB free."""
    gpu = FakeGpu()
    with ExitStack() as stack:
        stack.enter_context(patch("torch.Generator", _Generator))
        stack.enter_context(patch("torch.cuda.mem_get_info", lambda device: (1 << 30, 1 << 30)))
        stack.enter_context(gpu._recorder)
        stack.enter_context(_Devices())
        yield gpu


class _Generator(torch.Generator):
    """One for the GPU draws what one for the CPU would."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]  # torch's is in C


class _Devices(TorchFunctionMode):
    """Wherever `cuda` is asked for, asks for its stand-in, which torch's C++ does not take for an
    error."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_stand_in, (args, kwargs or {}))
        kwargs.pop("pin_memory", None)  # which only a real GPU can do
        if func is Tensor.cuda:
            return args[0].to(_STAND_IN)
        if func in (torch.tensor, torch.as_tensor):  # C++ would not make the values for `meta`
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        return func(*args, **kwargs)


def _stand_in(value: Any) -> Any:
    if isinstance(value, torch.device):
        return _STAND_IN if value.type == "cuda" else value
    return _STAND_IN if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class _Recorder(TorchDispatchMode):
    """Computes on the CPU, and says what a GPU would have had to do for it."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()
        self._on_the_way: list[
            Tensor
        ] = []  # into the CPU's memory, by copies that nothing has waited for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():  # in inference mode only; elsewhere autograd has done it
            with self:
                return func.decompose(*args, **kwargs)
        operands = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        on_gpu = any(isinstance(operand, GpuTensor) for operand in operands)
        packet = func.overloadpacket
        is_copy = packet in (_aten._to_copy, _aten.copy_)
        if is_copy:
            self._count_copy(args, kwargs)
        elif on_gpu:
            self._count_waits(packet, args)
            _refuse_mixed(func, (args[0], *args[2:]) if packet in _INDEXING else operands)
        device = kwargs.get("device")
        result_on_gpu = on_gpu if device is None else device.type == _STAND_IN.type
        if packet is _aten.copy_:
            result_on_gpu = isinstance(args[0], GpuTensor)
        if device is not None:
            kwargs = kwargs | {"device": _CPU}
        if not (on_gpu or result_on_gpu or func.is_view):
            self._refuse_early(func, operands)
        result = self._run(func, args, kwargs, operands, result_on_gpu)
        if is_copy and on_gpu and not result_on_gpu and _is_non_blocking(args, kwargs):
            self._on_the_way.append(result)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any, operands: list[Tensor], on_gpu: bool) -> Any:
        known = {
            id(operand.inner): operand for operand in operands if isinstance(operand, GpuTensor)
        }
        args, kwargs = tree_map(
            lambda value: value.inner if isinstance(value, GpuTensor) else value, (args, kwargs)
        )

        def place(value: Any) -> Any:
            if id(value) in known:  # changed in place
                return known[id(value)]
            return GpuTensor(value) if on_gpu and isinstance(value, Tensor) else value

        return tree_map(place, func(*args, **kwargs))

    def _count_copy(self, args: Any, kwargs: Any) -> None:
        if kwargs.get("device") is not None:
            source, to_gpu = args[0], kwargs["device"].type == _STAND_IN.type
        elif len(args) > 1:
            source, to_gpu = args[1], isinstance(args[0], GpuTensor)
        else:
            return
        if source.numel() and isinstance(source, GpuTensor) != to_gpu:
            self._add("copy", source.nbytes)
            if not _is_non_blocking(args, kwargs):
                self._add("wait")

    def _count_waits(self, packet: Any, args: Any) -> None:
        if packet in _WAITS:
            self._add("wait")
        if packet in _INDEXING:
            for index in args[1]:
                if index is not None and not isinstance(index, GpuTensor):
                    self._add("copy", index.nbytes)
                    self._add("wait")
                elif index is not None and index.dtype == torch.bool:  # nonzero
                    self._add("wait")

    def _refuse_early(self, func: Any, operands: Iterable[Tensor]) -> None:
        """What the CPU computes with must have arrived. The GPU itself does one after the other."""
        on_the_way = {tensor.untyped_storage().data_ptr() for tensor in self._on_the_way}
        for operand in operands if on_the_way else ():
            if operand.untyped_storage().data_ptr() in on_the_way:
                raise RuntimeError(
                    f"{func}: a tensor of shape {tuple(operand.shape)} is still on the way to the "
                    "CPU"
                )

    def _add(self, kind: str, size_bytes: int = 0) -> None:
        if kind == "wait":
            self._on_the_way.clear()
        in_backward = torch._C._current_graph_task_id() != -1
        self.traffic.events.append(Event(kind, size_bytes, _caller(), in_backward))


def _is_non_blocking(args: Any, kwargs: Any) -> bool:
    """Of `_to_copy` or `copy_`."""
    return bool(kwargs.get("non_blocking")) or any(value is True for value in args[2:])


def _refuse_mixed(func: Any, operands: Iterable[Any]) -> None:
    """As CUDA does: only numbers, and indices, may be on the CPU."""
    for operand in operands:
        if isinstance(operand, Tensor) and not isinstance(operand, GpuTensor) and operand.dim() > 0:
            raise RuntimeError(
                f"{func}: a tensor of shape {tuple(operand.shape)} is on the CPU, others on {GPU}"
            )


def _caller() -> str:
    """The innermost line that is not torch's or ours."""
    frame = sys._getframe(1)
    while frame.f_back and (
        "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno}"
