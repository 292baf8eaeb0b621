"""vLLM's own flags, as they stand in a command line."""

from __future__ import annotations

from collections.abc import Sequence

TENSOR_FLAGS = ("--tensor-parallel-size", "-tp")


def flag_names(vllm_flags: Sequence[str]) -> list[str]:
    """["--a=1", "--b_c", "2"] -> ["--a", "--b-c", "2"]: vLLM takes both ways of writing a name."""
    return [_split(flag)[0] for flag in vllm_flags]


def flag_value(vllm_flags: Sequence[str], *names: str) -> str | None:
    """The value that `--name=value` or `--name value` gives under any of a flag's names: the last
    if several; None without."""
    value = None
    for flag, after in zip(vllm_flags, [*vllm_flags, None][1:], strict=True):
        given, equals, inside = _split(flag)
        if any(means(given, name) for name in names):
            value = inside if equals else after
    return value


def means(given: str, name: str) -> bool:
    """True if vLLM takes what was given for this flag. Its parser takes a flag's beginning for the
    flag."""
    return given.strip("-") != "" and name.startswith(given)


def _split(flag: str) -> tuple[str, str, str]:
    name, equals, inside = flag.partition("=")
    return name.replace("_", "-"), equals, inside
