"""Where the models of a load test are served, and whether they can be, before anything is
measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from gradmap.common.console import waiting
from gradmap.common.errors import UserError
from gradmap.runtimes.openai_api import choose_model, open_client, served_models
from loadtest.options import DENSE, PRUNED
from loadtest.settings import LoadTestSettings
from loadtest.urls import base_url, is_url
from serving.machine import suited_to_machine
from serving.ports import free_port
from serving.server import check_servable
from serving.settings import ServerSettings

TIMEOUT_S = 30.0
MODEL_OPTIONS = {DENSE: "--dense-model", PRUNED: "--pruned-model"}


@dataclass(frozen=True)
class Endpoint:
    """url: as loadtest.urls.base_url makes it. model: what requests ask for."""

    url: str
    model: str


def find_endpoints(settings: LoadTestSettings) -> dict[str, Endpoint]:
    """Arm -> endpoint, of those arms that are URLs.

    Raises UserError unless each of them answers and has the model, and every directory can be
    served here.
    """
    endpoints = {}
    for arm, target in settings.arms.items():
        if is_url(target):
            endpoints[arm] = _find_endpoint(arm, base_url(target), settings.models)
        else:
            check_servable(server_settings(settings, target))
    return endpoints


def server_settings(settings: LoadTestSettings, directory: str) -> ServerSettings:
    """The settings of a server for this directory, on a port that is free now."""
    return suited_to_machine(
        ServerSettings(Path(directory), port=free_port(), vllm_flags=settings.vllm_flags)
    )


def _find_endpoint(arm: str, url: str, models: Mapping[str, str]) -> Endpoint:
    client = open_client(url, TIMEOUT_S)
    try:
        with waiting(f"Asking {url} for its model"), client:
            names = served_models(client)
    except (httpx.HTTPError, ValueError) as error:
        raise UserError(f"{url} does not answer as an OpenAI-compatible server: {error}.") from None
    try:
        return Endpoint(url, choose_model(names, models.get(arm)))
    except ValueError as error:
        option = MODEL_OPTIONS.get(arm, f"--candidate-model {arm}=MODEL")
        raise UserError(f"At {url}, {error}; say with {option} which one is meant.") from None
