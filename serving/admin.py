"""What probes and Prometheus ask (the port: serving.admin_port). Requests for completions do not
pass through it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import httpx
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.supervisor import State, Supervisor

PROBE_TIMEOUT_S = 2.0


class Admin:
    """Answers for one or several supervised servers."""

    def __init__(self, supervisors: Sequence[Supervisor]) -> None:
        self.supervisors = supervisors
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def app(self) -> Starlette:
        endpoints = (self.livez, self.readyz, self.startupz, self.info, self.metrics)
        return Starlette(
            routes=[Route(f"/{endpoint.__name__}", endpoint) for endpoint in endpoints]
        )

    def livez(self, request: Request) -> Response:
        """Answers 200 unless a server has failed for good. One that is being restarted is alive."""
        return self._states(lambda supervisor: supervisor.status.state is not State.FAILED)

    def readyz(self, request: Request) -> Response:
        """Answers 200 if every server has completed a request, has not been asked to stop, and its
        engine is alive now."""
        return self._states(
            lambda supervisor: (
                supervisor.status.state is State.READY and self._is_healthy(supervisor)
            )
        )

    def startupz(self, request: Request) -> Response:
        """Answers 200 once every server was ready for the first time; says how far the start has
        come."""
        return self._states(lambda supervisor: supervisor.status.was_ready)

    def info(self, request: Request) -> Response:
        """The artifact, plan and base model that are being served, and where, of each server."""
        return JSONResponse(
            [
                {
                    "url": supervisor.settings.url,
                    **asdict(supervisor.identity),
                    **_describe(supervisor),
                }
                for supervisor in self.supervisors
            ]
        )

    def metrics(self, request: Request) -> Response:
        """The metrics for Prometheus: ours and vLLM's, of all servers."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def collect(self) -> Iterable[Metric]:
        """Our metrics and vLLM's, as the registry's protocol asks for them."""
        ready = GaugeMetricFamily(
            "gradmap_serve_ready", "1 if requests are answered.", labels=["model_name"]
        )
        restarts = CounterMetricFamily(
            "gradmap_serve_restarts", "Restarts after a failure.", labels=["model_name"]
        )
        phases = GaugeMetricFamily(
            "gradmap_serve_phase_start_seconds",
            "When a phase of the start began.",
            labels=["model_name", "phase"],
        )
        info = InfoMetricFamily(
            "gradmap_serve_artifact", "What is being served.", labels=["model_name"]
        )
        for supervisor in self.supervisors:
            name, status = supervisor.identity.name, supervisor.status
            ready.add_metric([name], float(status.state is State.READY))
            restarts.add_metric([name], status.restarts)
            for phase, started_s in status.phases.items():
                phases.add_metric([name, phase], started_s)
            known = {
                "base_model": supervisor.identity.base_model,
                "plan_sha256": supervisor.identity.plan_sha256,
            }
            info.add_metric([name], {key: value or "" for key, value in known.items()})
        return [ready, restarts, phases, info, *self._vllm_metrics()]

    def _vllm_metrics(self) -> Iterator[Metric]:
        """vLLM's families, each once; their samples carry the model's name."""
        families: dict[str, Metric] = {}
        for supervisor in self.supervisors:
            for family in text_string_to_metric_families(self._fetch(supervisor, "/metrics") or ""):
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples += family.samples
        yield from families.values()

    def _is_healthy(self, supervisor: Supervisor) -> bool:
        return self._fetch(supervisor, "/health") is not None

    def _fetch(self, supervisor: Supervisor, path: str) -> str | None:
        try:
            with supervisor.settings.client(PROBE_TIMEOUT_S) as client:
                return client.get(path).raise_for_status().text
        except httpx.HTTPError:
            return None

    def _states(self, is_fine: Callable[[Supervisor], bool]) -> JSONResponse:
        fine = [is_fine(supervisor) for supervisor in self.supervisors]
        states = {
            supervisor.identity.name: _describe(supervisor) for supervisor in self.supervisors
        }
        return JSONResponse(states, status_code=200 if all(fine) else 503)


def _describe(supervisor: Supervisor) -> dict[str, Any]:
    status = supervisor.status
    elapsed_s = time.monotonic() - status.started
    return {
        "state": status.state,
        "phase": status.phase,
        "phases_s": {phase: round(started_s, 1) for phase, started_s in status.phases.items()},
        "elapsed_s": round(elapsed_s, 1),
        "restarts": status.restarts,
        "error": status.error,
    }
