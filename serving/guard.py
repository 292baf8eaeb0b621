"""In vLLM's own process, in front of its routes: closes what no key guards, says what is being
served, and proves to gradmap-serve that it is its server that listens.

vLLM asks for a key only below /v1 and a few other prefixes. /metrics, /tokenize, /load, /version,
/docs, /invocations and some more answer anyone, so on a public address they do not exist.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.proof import CHALLENGE_HEADER, PASS_HEADER, PASS_VARIABLE, PROOF_PATH, proof
from serving.settings import ServerSettings

OPEN_PREFIX = "/v1/"
OPEN_PATHS = ("/health", "/ping")
# From gradmap-serve to the guard: what to add to /v1/models, and whether to close.
IDENTITY_VARIABLE, CLOSED_VARIABLE = "GRADMAP_IDENTITY", "GRADMAP_CLOSED"


def guard_environment(settings: ServerSettings, identity: Mapping[str, Any]) -> dict[str, str]:
    """Returns the environment variables with which the guard works as `settings` demand."""
    closed = {CLOSED_VARIABLE: "1"} if settings.is_public else {}
    return {IDENTITY_VARIABLE: json.dumps(identity), **closed}


class Guard:
    """Pure ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.identity = json.loads(os.environ.get(IDENTITY_VARIABLE, "null"))
        self.closed = CLOSED_VARIABLE in os.environ
        self.secret = os.environ.get(PASS_VARIABLE, "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, headers = (
                scope["path"].removeprefix(scope.get("root_path", "")),
                Headers(scope=scope),
            )
            if path == PROOF_PATH and self.secret:
                answer = proof(self.secret, headers.get(CHALLENGE_HEADER, ""))
                await PlainTextResponse(answer)(scope, receive, send)
                return
            if self.closed and not self._is_open(path, headers):
                message = "closed on a public address; gradmap-serve's admin port has /metrics"
                await JSONResponse({"error": message}, status_code=404)(scope, receive, send)
                return
            if path == "/v1/models" and self.identity is not None:
                send = _AddToModels(send, self.identity)
        await self.app(scope, receive, send)

    def _is_open(self, path: str, headers: Headers) -> bool:
        if path.startswith(OPEN_PREFIX) or path in OPEN_PATHS:
            return True
        return bool(self.secret) and hmac.compare_digest(headers.get(PASS_HEADER, ""), self.secret)


class _AddToModels:
    """Holds the response back until it is whole, then sends it with the identity in every model's
    card."""

    def __init__(self, send: Send, identity: dict[str, Any]) -> None:
        self._send, self._identity = send, identity
        self._start: Message = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        if self._start["status"] == 200:
            self._add()
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": self._body})

    def _add(self) -> None:
        models = json.loads(self._body)
        for card in models["data"]:
            card["gradmap"] = self._identity
        self._body = json.dumps(models).encode()
        headers = [
            (name, value)
            for name, value in self._start["headers"]
            if name.lower() != b"content-length"
        ]
        self._start["headers"] = [*headers, (b"content-length", str(len(self._body)).encode())]
