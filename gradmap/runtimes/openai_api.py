"""What every client of an OpenAI-compatible server needs: its key, a connection, and the name of
its model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import httpx

from gradmap.common.errors import UserError
from gradmap.common.loopback import own_transport

# A key never goes through argv, which every user of the machine can read.
KEY_VARIABLE = "VLLM_API_KEY"


def authorization() -> dict[str, str]:
    """The bearer header for the key, if one is set. Raises UserError if no header can carry it."""
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        return {}
    require_key(key, KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"}


def require_key(key: str, source: str) -> None:
    """Raises UserError unless every client can send the key in an HTTP header. source: where it
    stands."""
    if key != key.strip() or not all(" " <= character <= "~" for character in key):
        raise UserError(
            f"The API key in {source} has characters that an HTTP header cannot carry; "
            "it must be one line of printable ASCII without spaces around it."
        )


def open_client(url: str, timeout_s: float) -> httpx.Client:
    """A client of the server that the user names, with the key. Raises UserError if `url` or the
    key is malformed."""
    try:
        transport = own_transport(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{url} is no valid URL ({error}); check it.") from None
    return httpx.Client(
        base_url=url.rstrip("/"), headers=authorization(), timeout=timeout_s, transport=transport
    )


def served_model(client: httpx.Client) -> str:
    """Returns the name of the (first) model a server offers. Raises httpx.HTTPError or ValueError
    if none."""
    return served_models(client)[0]


def choose_model(names: Sequence[str], wanted: str | None) -> str:
    """The model that is wanted, or the only one if None is. Raises ValueError if it is not there,
    or there are several."""
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return str(wanted)
    problem = "several models are served" if wanted is None else f"{wanted!r} is not served"
    raise ValueError(f"{problem}: {', '.join(map(repr, names))}")


def served_models(client: httpx.Client) -> list[str]:
    """The names of the models a server offers, one at least. Raises httpx.HTTPError or ValueError
    if there are none."""
    answer = client.get("/v1/models").raise_for_status().json()
    listed = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(listed, list):
        raise ValueError("its list of models is none")
    names = [model.get("id") for model in listed if isinstance(model, dict)]
    known = [name for name in names if isinstance(name, str) and name]
    if not known:
        raise ValueError("its list of models is empty")
    # no argument of a process, and no text in UTF-8, holds every character
    if not all(map(str.isprintable, known)):
        listed_names = ", ".join(map(repr, known))
        raise ValueError(f"it lists models with names that cannot be written: {listed_names}")
    return known
