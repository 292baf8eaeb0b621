"""`gradmap-serve DIR` and `gradmap serve DIR`: serve until asked to stop."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gradmap.cli import quiet_libraries, run_app
from gradmap.console import say

SAY_EVERY_S = 15.0


class Terminated(BaseException):
    """SIGTERM arrived."""


def serve(
    directory: Annotated[Path, typer.Argument(help="A model directory, such as one exported with --format vllm.")],
    vllm_flags: Annotated[list[str] | None, typer.Argument(help="vLLM's own flags, after --.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless you say otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    ready_timeout_s: Annotated[float, typer.Option(help="Give up if no request was completed by then.")] = 900.0,
) -> None:
    """Serve a model over the OpenAI API with vLLM, until ctrl-C or SIGTERM."""
    from serving.server import Server, ServerSettings

    settings = ServerSettings(directory, host, port, tuple(vllm_flags or ()), ready_timeout_s)
    signal.signal(signal.SIGTERM, _raise_terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    started = time.monotonic()
    try:
        with Server(settings) as server:
            say(f"Starting vLLM for {directory}; the first start of a model compiles it and can take minutes")
            model = server.wait_until_ready(_announce_waiting())
            say(f"Ready after {time.monotonic() - started:.0f} s: {settings.url}/v1 serves {model}")
            say(
                f"Try: curl {settings.url}/v1/completions -H 'Content-Type: application/json' "
                f'-d \'{{"model": "{model}", "prompt": "The capital of France is", "max_tokens": 16}}\''
            )
            server.wait()
    except Terminated:
        say("Stopped by SIGTERM; every process of the server has ended.")


def _raise_terminated(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the orderly stop short
    raise Terminated


def _announce_waiting() -> Any:
    last = 0.0

    def on_poll(elapsed_s: float) -> None:
        nonlocal last
        if elapsed_s - last >= SAY_EVERY_S:
            last = elapsed_s
            say(f"Waiting for the first completed request ({elapsed_s:.0f} s)")

    return on_poll


def main() -> None:
    """Console script `gradmap-serve`."""
    quiet_libraries()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve)
    sys.exit(run_app(app))
