"""What every client of an OpenAI-compatible server needs: its key, and the name of its model."""

from __future__ import annotations

import os

import httpx

# A key never goes through argv, which every user of the machine can read.
KEY_VARIABLE = "VLLM_API_KEY"


def authorization() -> dict[str, str]:
    """The bearer header for the key, if one is set."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def served_model(client: httpx.Client) -> str:
    """Returns the name of the (first) model a server offers. Raises httpx.HTTPError, KeyError or ValueError if none."""
    return str(client.get("/v1/models").raise_for_status().json()["data"][0]["id"])
