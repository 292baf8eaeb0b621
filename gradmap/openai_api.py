"""What every client of an OpenAI-compatible server needs: its key, and the name of its model."""

from __future__ import annotations

import os

import httpx


def authorization() -> dict[str, str]:
    """The bearer header for VLLM_API_KEY, if that is set; a key never goes through argv."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def served_model(client: httpx.Client) -> str:
    """Returns the name of the (first) model a server offers. Raises httpx.HTTPError, KeyError or ValueError if none."""
    return str(client.get("/v1/models").raise_for_status().json()["data"][0]["id"])
