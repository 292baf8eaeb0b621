"""A few seconds out of a long computation, recorded by torch's profiler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

# What is recorded takes up to fifty times as long to add up.
RECORDED_S = 2.0
ROWS = 25


class EnoughError(Exception):
    """Raised once all that was to be recorded is."""


class Recording:
    """A profile that begins after some seconds. Asked whenever a layer runs."""

    def __init__(self, after_s: float) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profiler = profile(activities=activities)
        self.begun = False
        self._due = time.monotonic() + after_s

    def on_layer(self, *call: Any) -> None:
        """Begins the recording when it is due. Raises EnoughError once it is complete."""
        if time.monotonic() < self._due:
            return
        if self.begun:
            raise EnoughError
        self.profiler.start()
        self.begun, self._due = True, time.monotonic() + RECORDED_S

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.profiler.stop()


def profile_tables(
    run: Callable[[], object], layers: Iterable[nn.Module], after_s: float
) -> dict[str, str]:
    """The operations that took most of the device's and of the CPU's time, in RECORDED_S after
    `after_s`, or to the end of `run` if that comes first. layers: of the model that it runs; with
    the next of them it ends, by an exception."""
    layers = list(layers)
    recording = _record(run, layers, after_s)
    if not recording.begun:  # it was faster than its caller thought
        recording = _record(run, layers, 0.0)
    operations = recording.profiler.key_averages()
    return {
        order: operations.table(sort_by=f"self_{order}_time_total", row_limit=ROWS)
        for order in ("device", "cpu")
    }


def _record(run: Callable[[], object], layers: Iterable[nn.Module], after_s: float) -> Recording:
    recording = Recording(after_s)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(recording.on_layer).remove)
        with suppress(EnoughError):
            run()
    if recording.begun:
        recording.end()
    return recording
