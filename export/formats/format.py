"""What a format of artifacts says of itself: how it is written, stored, run, checked and used.

Read at the start of every command, so that nothing heavy is imported here, nor by the modules of
the formats before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.foreign import ForeignEnvironment
from gradmap.common.children import module_command
from gradmap.common.errors import UserError

if TYPE_CHECKING:
    from export.writers import Source, Storage, Written

ANY_DTYPE = ("float32", "float16", "bfloat16", "float64")
# What --quantise may ask for, and what the layers' weights are then stored as.
QUANTISATIONS = {
    "int8": "8-bit integers",
    "int8-gptq": "8-bit integers chosen by SmoothQuant and GPTQ",
    "fp8": "8-bit floating-point numbers",
    "w4a16": "4-bit integers chosen by GPTQ",
    "int4": "4-bit integers",
    "q6_k": "llama.cpp's 6-bit blocks",
    "q5_k_m": "llama.cpp's 5-bit blocks, some wider",
    "q4_k_m": "llama.cpp's 4-bit blocks, some wider",
    "iq4_xs": "llama.cpp's 4-bit blocks of unequal steps",
}
# Those that cannot do without samples.
CALIBRATED = ("int8-gptq", "w4a16")


@dataclass(frozen=True)
class Runner:
    """A program that must reproduce the reference with an artifact: export.runners.run_NAME, or
    run_NAME.py of export.foreign.

    package: what it imports that may be missing here. environment: where it runs, None for ours.
    in_float32: it computes in float32 whatever is stored, and not in the dtype that config.json
    names. in_halves: it rounds some activations to float16 whatever is stored. far: it reads from
    the artifact what happens far into a text. optional: it is left out where its package is
    missing, or the user says so (--no-check-vllm). least_s: seconds that it takes of the smallest
    model.
    """

    name: str
    package: str | None = None
    environment: ForeignEnvironment | None = None
    in_float32: bool = False
    in_halves: bool = False
    far: bool = True
    optional: bool = False
    least_s: float = 0.0

    @property
    def installed(self) -> bool:
        return self.package is None or find_spec(self.package) is not None

    def command(self, *arguments: str) -> list[str]:
        """Runs it, in a process of its own."""
        if self.environment is not None:
            return self.environment.script_command(f"run_{self.name}.py", *arguments)
        return module_command(f"export.runners.run_{self.name}", *arguments)


TRANSFORMERS = Runner("transformers", in_float32=True)


def require_nothing(
    config: dict[str, Any], quantise: str | None, runners: Sequence[Runner]
) -> None:
    """For a format that takes any model, on any machine."""


@dataclass(frozen=True)
class Format:
    """One kind of artifact, with all that is asked of it anywhere.

    name: of --format, and of its directory. use: how it is loaded, a sentence of the model card.
    library: what the Hugging Face Hub takes it for. write(directory, source, storage) -> what was
    written. dtypes: what its weights may be stored in, the default first. quantisations: likewise,
    besides none. runners: what must reproduce the reference with it, the first also where it is
    received (`gradmap verify`). served: whether vLLM reads it, and so gradmap-serve. unfit_ropes:
    the types that it cannot express. require(config, quantise, runners): raises UserError if a
    model, or this machine, cannot have it, besides for want of a runner's package. memory_factor:
    how often the model is in memory while it is converted, 0 where it never is whole.
    conversion_s_per_layer: what a program that converts takes besides, None without one.
    """

    name: str
    use: str
    library: str
    write: Callable[[Path, Source, Storage], Written]
    dtypes: tuple[str, ...]
    quantisations: tuple[str, ...] = ()
    runners: tuple[Runner, ...] = (TRANSFORMERS,)
    served: bool = False
    unfit_ropes: tuple[str, ...] = ()
    require: Callable[[dict[str, Any], str | None, Sequence[Runner]], None] = require_nothing
    memory_factor: int = 0
    conversion_s_per_layer: float | None = None

    @property
    def default_dtype(self) -> str:
        return self.dtypes[0]

    def require_package(self, package: str) -> None:
        """Raises UserError if it is not installed."""
        if find_spec(package) is None:
            raise UserError(
                f"Format {self.name} needs the package {package}; install the extra gradmap[cpu] "
                "or gradmap[gpu]."
            )
