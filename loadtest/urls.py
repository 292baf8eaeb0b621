"""The URL of a server as people write it: a port, a prefix that a router wants, the `/v1` of other
clients."""

from __future__ import annotations

from urllib.parse import urlsplit

from gradmap.common.errors import UserError

VERSION = "/v1"
COMPLETIONS = f"{VERSION}/completions"


def is_url(target: str) -> bool:
    return target.lower().startswith(("http://", "https://"))


def base_url(url: str) -> str:
    """What /v1/models and /metrics come behind, so without /v1 at its end. Raises UserError if it
    is no such URL."""
    problem = _problem(url)
    if problem is not None:
        raise UserError(
            f"{url!r} is no URL of a server ({problem}); write it as http://HOST:PORT or "
            "http://HOST/PREFIX."
        )
    parts = urlsplit(url)
    prefix = parts.path.rstrip("/").removesuffix(VERSION).rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{prefix}"


def completions_path(url: str) -> str:
    """The path of completions at a URL that `base_url` made."""
    return urlsplit(url).path + COMPLETIONS


def _problem(url: str) -> str | None:
    if not url.isascii() or not url.isprintable() or " " in url:
        return "it has characters that must be escaped"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return str(error)
    if not parts.hostname:
        return "it names no host"
    if port == 0:
        return "nothing listens on port 0"
    if parts.username is not None or parts.password is not None:
        return "a key belongs into VLLM_API_KEY, not into what a report quotes"
    return "it ends with a query" if parts.query or parts.fragment else None
