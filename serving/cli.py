"""`gradmap-serve DIR` and `gradmap serve DIR`: serve until asked to stop."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gradmap.cli import quiet_libraries, run_app
from gradmap.common.errors import UserError
from gradmap.common.files import cache_directory
from gradmap.common.options import finite_numbers
from gradmap.common.signals import Terminated, raising_signals
from serving.flags import flag_names, means


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


def serve(
    directories: Annotated[
        list[str], typer.Argument(help="A model directory, then vLLM's own flags, after --.")
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="Serve two: DENSE at --port, PRUNED at the next.")
    ] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on; loopback unless you say otherwise.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    admin_host: Annotated[str, typer.Option(help="Address for probes and metrics.")] = "127.0.0.1",
    admin_port: Annotated[
        int | None, typer.Option(help="Port for probes and metrics; --port + 1000.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Clients need the key in it; or set VLLM_API_KEY.")
    ] = None,
    allow_anonymous: Annotated[
        bool,
        typer.Option(
            "--allow-anonymous",
            help="Serve a public address even if there is no key, nor its file.",
        ),
    ] = False,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file; serves https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its private key.")] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the artifact's files with their hashes first.")
    ] = True,
    require_artifact: Annotated[
        bool,
        typer.Option("--require-artifact", help="Refuse a directory that gradmap did not export."),
    ] = False,
    expect_sha256: Annotated[
        list[str] | None,
        typer.Option(help="SHA-256 of the artifact's gradmap.json; with --compare, one of each."),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="How often in a row a server that fails is restarted.")
    ] = 3,
    drain_s: Annotated[
        int, typer.Option(min=0, help="Seconds that requests may go on when asked to stop.")
    ] = 20,
    balancer_wait_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds between not ready and stopping; 5, or 0 on loopback."),
    ] = None,
    ready_timeout_s: Annotated[
        float, typer.Option(help="Give up if no request was completed by then.")
    ] = 900.0,
    log: Annotated[
        str | None, typer.Option(help="File for vLLM's output, - for stderr; in the cache.")
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Plain lines, or a JSON object per line.")
    ] = LogFormat.TEXT,
) -> None:
    """Serve a model over the OpenAI API with vLLM, until ctrl-C or SIGTERM.

    /livez, /readyz, /startupz, /info and /metrics are at the admin port. Exit code 0 after SIGTERM,
    130 after ctrl-C, 1 if the server failed and was not to be restarted any more, 2 if it could not
    start (75 if for want of memory), 70 after a mistake of ours.
    """
    code = 0
    # the imports and the hashes take their time; it is no failure here
    with suppress(Terminated), raising_signals():
        from serving.identity import Trust
        from serving.launch import Launch, run
        from serving.log import Log
        from serving.settings import ServerSettings
        from serving.supervisor import Policy

        models, vllm_flags = split_arguments(directories, 2 if compare else 1)
        _read_key(api_key_file, allow_anonymous)
        if (tls_certificate is None) != (tls_key is None):
            raise UserError("TLS needs both --tls-certificate and --tls-key.")
        settings = ServerSettings(
            Path(),
            host,
            port,
            vllm_flags,
            ready_timeout_s,
            drain_s,
            certificate=tls_certificate,
            private_key=tls_key,
        )
        if settings.is_public and not allow_anonymous:
            _require_key(host)
        wait_s = balancer_wait_s if balancer_wait_s is not None else 5.0 * settings.is_public
        expected_hashes: Sequence[str | None] = expect_sha256 or [None] * len(models)
        if len(expected_hashes) != len(models):
            raise UserError(
                "Give --expect-sha256 once for every model, in their order, or not at all."
            )
        path = Path(log) if log else cache_directory() / "serve" / f"{port}.log"
        trusts = [Trust(verify, require_artifact, expected) for expected in expected_hashes]
        launch = Launch(
            models=[Path(model) for model in models],
            settings=settings,
            policy=Policy(restarts, wait_s),
            admin_host=admin_host,
            admin_port=admin_port if admin_port is not None else port + 1000,
            trusts=trusts,
        )
        with closing(Log(None if log == "-" else path, log_format is LogFormat.JSON)) as output:
            code = run(launch, output)
    raise typer.Exit(code)


def split_arguments(arguments: Sequence[str], count: int) -> tuple[list[str], tuple[str, ...]]:
    """Returns `count` directories and vLLM's flags. Raises UserError on another number, or on a
    flag that is ours."""
    first_flag = next(
        (index for index, argument in enumerate(arguments) if argument.startswith("-")),
        len(arguments),
    )
    if first_flag != count:
        raise UserError(
            f"Name {count} model director{'y' if count == 1 else 'ies'}; vLLM's flags come after "
            "--."
        )
    flags = tuple(arguments[first_flag:])
    for name in flag_names(flags):
        if means(name, "--api-key"):
            raise UserError(
                "A key in the arguments is seen by every user of the machine; use --api-key-file."
            )
        if any(means(name, own) for own in ("--host", "--port", "--ssl-certfile", "--ssl-keyfile")):
            raise UserError(
                f"{name} comes before --, as gradmap-serve's own option (TLS: --tls-certificate, "
                "--tls-key)."
            )
    return list(arguments[:first_flag]), flags


def _read_key(path: Path | None, allow_anonymous: bool) -> None:
    """Puts the key where vLLM and our own requests look for it. The file may be missing if there is
    another key, or if none is asked for: the container image names it always."""
    from gradmap.common.reading import read_text
    from gradmap.runtimes.openai_api import KEY_VARIABLE, require_key

    dispensable = allow_anonymous or os.environ.get(KEY_VARIABLE)
    if path is None or (dispensable and not path.exists()):
        return
    key = read_text(path).strip()
    if not key:
        raise UserError(f"{path} is empty; it should hold the API key.")
    require_key(key, str(path))
    os.environ[KEY_VARIABLE] = key


def _require_key(host: str) -> None:
    from gradmap.runtimes.openai_api import authorization

    if not authorization():
        raise UserError(
            f"{host} is reachable from outside, and no key is asked for; give --api-key-file, or "
            "--allow-anonymous to serve whoever asks."
        )


def main() -> None:
    """Console script `gradmap-serve`."""
    quiet_libraries()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(finite_numbers(serve))
    sys.exit(run_app(app))
