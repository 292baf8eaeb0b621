"""vLLM's own flags, as they stand in a command line."""

from __future__ import annotations

from collections.abc import Sequence


def flag_names(vllm_flags: Sequence[str]) -> list[str]:
    """["--a=1", "--b", "2"] -> ["--a", "--b", "2"]."""
    return [flag.partition("=")[0] for flag in vllm_flags]
