"""Who listens on the server's port? Ours proves that it knows a secret, which never travels before
that.

Another program may take the port in the minute that vLLM needs to start, or when it has died.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Generator

import httpx

from gradmap.runtimes.openai_api import authorization

PROOF_PATH = "/gradmap-proof"
CHALLENGE_HEADER = "X-Gradmap-Challenge"
# The secret: in the environment of our server, and in a header where it opens what is closed
# (serving.guard).
PASS_VARIABLE = "GRADMAP_PASS"
PASS_HEADER = "X-Gradmap-Pass"


class NotOursError(httpx.TransportError):
    """Raised when something else answers where our server should."""


def proof(secret: str, challenge: str) -> str:
    """The answer to the challenge that takes the secret to give, in hexadecimal digits."""
    return hmac.new(secret.encode(), challenge.encode(), "sha256").hexdigest()


class OnlyToOurs(httpx.Auth):
    """Adds the key and the secret to each request, after who listens has met a new challenge.

    Raises NotOursError if it does not.
    """

    requires_response_body = True

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        challenge = secrets.token_urlsafe()
        url, headers = request.url.join(PROOF_PATH), {CHALLENGE_HEADER: challenge}
        # the extensions hold the request's time limit
        answer = yield httpx.Request("GET", url, headers=headers, extensions=request.extensions)
        if not hmac.compare_digest(answer.content, proof(self._secret, challenge).encode()):
            raise NotOursError("another program listens on the server's port")
        request.headers.update({**authorization(), PASS_HEADER: self._secret})
        yield request
