"""Keeps one vLLM server running until it is asked to stop, and knows at every moment what state it
is in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from threading import Event

from gradmap.common.heartbeat import Heartbeat
from serving.identity import Identity
from serving.log import FIRST_PHASE, Log
from serving.server import Server, ServerError
from serving.settings import ServerSettings

POLL_S = 0.2
# A server that was ready for so long has earned all its restarts anew.
STABLE_S = 600.0
LONGEST_WAIT_S = 60.0


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "waiting to restart"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Policy:
    """When and how a server ends and is started again. restarts: how many in a row.
    balancer_wait_s: between the end of readiness and that of the server, for load balancers to
    notice."""

    restarts: int = 3
    balancer_wait_s: float = 0.0


@dataclass(frozen=True)
class Status:
    """How a supervised server is. phases: seconds after the start at which each phase began, in
    order. restarts: since the first start."""

    state: State = State.STARTING
    started: float = field(default_factory=time.monotonic)
    phases: dict[str, float] = field(default_factory=lambda: {FIRST_PHASE: 0.0})
    was_ready: bool = False
    restarts: int = 0
    error: str | None = None

    @property
    def phase(self) -> str:
        return next(reversed(self.phases))


def back_off_s(failures: int) -> float:
    """Seconds to wait before the restart after so many failures in a row: 1, 2, 4, ... up to a
    minute."""
    return float(min(LONGEST_WAIT_S, 2.0 ** (failures - 1)))


class _StopAsked(Exception):  # noqa: N818 - it is none
    """Raised when it was asked to stop before it was ready."""


class Supervisor:
    """Keeps one server running. `run` keeps to one thread: Linux kills a child when the thread that
    started it ends (see serving.vllm_server).

    `status` is replaced as a whole, so that other threads can read it at any time. failure: what
    ended it.
    """

    def __init__(
        self, settings: ServerSettings, identity: Identity, policy: Policy, log: Log
    ) -> None:
        self.settings, self.identity, self.policy, self.log = settings, identity, policy, log
        self.status = Status()
        self.failure: Exception | None = None
        self._server: Server | None = None
        self._heartbeat = Heartbeat(log.say)

    def run(self, stopping: Event) -> None:
        """Serves until `stopping` is set, or fails for good: whatever goes wrong, the state says
        so, and no process of the server is left."""
        self.status = Status()
        try:
            self._serve_again_and_again(stopping)
        except Exception as error:
            self.failure = error
            self.status = replace(
                self.status, state=State.FAILED, error=str(error) or type(error).__name__
            )
            self.kill()
        else:
            self.status = replace(self.status, state=State.STOPPED)

    def _serve_again_and_again(self, stopping: Event) -> None:
        """Starts the server again whenever it fails, until `stopping` is set. A first start that
        fails is not repeated: it would fail again."""
        failures = 0
        while not stopping.is_set():
            try:
                self._serve(stopping)
            except ServerError as error:
                failures = 1 if time.monotonic() - self.status.started > STABLE_S else failures + 1
                if not self.status.was_ready or failures > self.policy.restarts:
                    raise
                self.status = replace(self.status, error=str(error), state=State.RESTARTING)
                wait_s = back_off_s(failures)
                self.log.say(
                    f"{error} Restart {failures} of {self.policy.restarts} in {wait_s:.0f} s",
                    "ERROR",
                )
                stopping.wait(wait_s)
                self.status = replace(
                    Status(),
                    was_ready=True,
                    restarts=self.status.restarts + 1,
                    error=self.status.error,
                )

    def kill(self) -> None:
        """Ends the server without waiting for its requests."""
        if self._server is not None:
            self._server.kill()

    def _serve(self, stopping: Event) -> None:
        def stop_if_asked() -> None:
            if stopping.is_set():
                raise _StopAsked

        try:
            with Server(self.settings, self.log, self._enter_phase) as self._server:
                with self._heartbeat.during(lambda _: self._describe_start()):
                    model = self._server.wait_until_ready(stop_if_asked)
                self._become_ready(model)
                while not stopping.wait(POLL_S):
                    self._server.require_running()
                self._drain()
        except _StopAsked:
            pass

    def _enter_phase(self, phase: str) -> None:
        if phase not in self.status.phases:
            elapsed_s = time.monotonic() - self.status.started
            self.status = replace(self.status, phases={**self.status.phases, phase: elapsed_s})
            self.log.say(self._describe_start())
            self._heartbeat.spoke()

    def _describe_start(self) -> str:
        return f"[{time.monotonic() - self.status.started:4.0f} s] {self.status.phase}"

    def _become_ready(self, model: str) -> None:
        elapsed_s = time.monotonic() - self.status.started
        phases = {**self.status.phases, "ready": elapsed_s}
        self.status = replace(self.status, state=State.READY, was_ready=True, phases=phases)
        self.log.say(f"Ready after {elapsed_s:.0f} s: {self.settings.url}/v1 serves {model}")

    def _drain(self) -> None:
        self.status = replace(self.status, state=State.DRAINING)
        wait_s, drain_s = self.policy.balancer_wait_s, self.settings.drain_s
        waiting = f"{wait_s:.0f} s for load balancers to notice, then " if wait_s else ""
        self.log.say(
            f"Draining: not ready any more; {waiting}up to {drain_s} s for requests in flight"
        )
        time.sleep(wait_s)
