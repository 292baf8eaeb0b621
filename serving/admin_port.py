"""The admin port: a small web server in a thread of its own, which no client can hold up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from gradmap.common.errors import UserError
from serving.ports import bind

POLL_S = 0.05
# From connecting, or from the last answer, to an answer that is complete. Metrics of two busy
# servers take 8 s.
ANSWER_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 2


class Impatient(H11Protocol):
    """Ends a connection that has no complete answer in time; uvicorn would wait for ever for who
    sends nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        self._deadline.cancel()
        self._wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(ANSWER_TIMEOUT_S, self.transport.abort)


@contextmanager
def serving_admin(app: Starlette, host: str, port: int) -> Iterator[None]:
    """Answers on the admin port for the length of a `with` block. Raises UserError if nobody can
    listen there."""
    config = uvicorn.Config(
        app,
        http=Impatient,
        ws="none",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=STOP_TIMEOUT_S,
    )
    server = uvicorn.Server(config)
    with bind(host, port, "--admin-port") as listener:
        thread = Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(POLL_S)
        if not server.started:
            raise UserError(f"The admin port {port} could not be served; the reason is above.")
        try:
            yield
        finally:
            server.should_exit = True
            thread.join()
