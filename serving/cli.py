"""`gradmap-serve DIR` and `gradmap serve DIR`: serve until asked to stop."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradmap.cli import quiet_libraries, run_app
from gradmap.common.errors import UserError
from gradmap.common.files import cache_directory
from gradmap.common.options import finite_numbers, takes
from gradmap.common.signals import Terminated, raising_signals
from serving.flags import flag_names, means
from serving.options import ServeOptions

if TYPE_CHECKING:
    from serving.launch import Launch


@takes(ServeOptions)
def serve(
    options: ServeOptions,
    directories: Annotated[
        list[str], typer.Argument(help="A model directory, then vLLM's own flags, after --.")
    ],
) -> None:
    """Serve a model over the OpenAI API with vLLM, until ctrl-C or SIGTERM.

    /livez, /readyz, /startupz, /info and /metrics are at the admin port. Exit code 0 after SIGTERM,
    130 after ctrl-C, 1 if the server failed and was not to be restarted any more, 2 if it could not
    start (75 if for want of memory), 70 after a mistake of ours.
    """
    raise typer.Exit(serve_until_stopped(directories, options))


def serve_until_stopped(arguments: Sequence[str], options: ServeOptions) -> int:
    """Returns the exit code. arguments: model directories, then vLLM's flags. Raises UserError for
    what cannot be served so."""
    code = 0
    # the imports and the hashes take their time; it is no failure here
    with suppress(Terminated), raising_signals():
        from serving.launch import run
        from serving.log import Log

        launch = _launch_of(arguments, options)
        path = cache_directory() / "serve" / f"{options.port}.log"
        path = Path(options.log) if options.log else path
        in_json = options.log_format == "json"
        with closing(Log(None if options.log == "-" else path, in_json)) as output:
            code = run(launch, output)
    return code


def _launch_of(arguments: Sequence[str], options: ServeOptions) -> Launch:
    from serving.identity import Trust
    from serving.launch import Launch
    from serving.settings import ServerSettings
    from serving.supervisor import Policy

    models, vllm_flags = split_arguments(arguments, 2 if options.compare else 1)
    _read_key(options.api_key_file, options.allow_anonymous)
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise UserError("TLS needs both --tls-certificate and --tls-key.")
    settings = ServerSettings(
        Path(),
        options.host,
        options.port,
        vllm_flags,
        options.ready_timeout_s,
        options.drain_s,
        certificate=options.tls_certificate,
        private_key=options.tls_key,
    )
    if settings.is_public and not options.allow_anonymous:
        _require_key(options.host)
    wait_s = options.balancer_wait_s
    wait_s = 5.0 * settings.is_public if wait_s is None else wait_s
    expected_hashes: Sequence[str | None] = options.expect_sha256 or [None] * len(models)
    if len(expected_hashes) != len(models):
        raise UserError("Give --expect-sha256 once for every model, in their order, or not at all.")
    return Launch(
        models=[Path(model) for model in models],
        settings=settings,
        policy=Policy(options.restarts, wait_s),
        admin_host=options.admin_host,
        admin_port=options.port + 1000 if options.admin_port is None else options.admin_port,
        trusts=[
            Trust(options.verify, options.require_artifact, expected)
            for expected in expected_hashes
        ],
    )


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
