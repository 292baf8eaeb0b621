"""Programs of libraries that cannot live beside vLLM, because they need other versions of the same
packages: each has an environment of its own, which is found by a program that it puts on PATH.

The other files of this directory are run by the Python of such an environment. They import nothing
of ours, for it is not there.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gradmap.common.errors import UserError


@dataclass(frozen=True)
class ForeignEnvironment:
    """program: what it puts on PATH. need: what needs it, the beginning of a sentence. package:
    what is installed to have it."""

    program: str
    need: str
    package: str

    def find(self) -> str:
        """The program's path. Raises UserError if it is not there."""
        found = shutil.which(self.program)
        if found is None:
            raise UserError(
                f"{self.need} as the program {self.program}; install it in an environment of its "
                f"own: pipx install {self.package}, or uv tool install {self.package}."
            )
        return found

    def python_command(self, *arguments: str) -> list[str]:
        """Its Python. Raises UserError if it is not there."""
        # what pipx and uv put on PATH are links into the environment
        return [str(Path(self.find()).resolve().parent / "python"), "-P", *arguments]

    def script_command(self, script: str, *arguments: str) -> list[str]:
        """Its Python with a file of this directory. Raises UserError if it is not there."""
        return self.python_command(str(Path(__file__).with_name(script)), *arguments)

    def has(self, module: str) -> bool:
        """Whether it is there, with a module that may be missing from it."""
        if shutil.which(self.program) is None:
            return False
        looking = f"import sys, importlib.util; sys.exit(not importlib.util.find_spec({module!r}))"
        return subprocess.run(self.python_command("-c", looking), check=False).returncode == 0
