"""A checkpoint becomes a model in memory, or one of which a layer at a time is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gradmap.common.console import waiting
from gradmap.common.errors import UserError, first_line
from gradmap.common.processes import local_device
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.precision import (
    AUTOCAST,
    announce,
    fastest_dtype,
    prepare_for_autocast,
    warn_if_slow,
    weights_dtype,
)

SPREAD = "spread"  # over all GPUs
DEVICES = ("auto", "cpu", "cuda", SPREAD)


def load_model(
    checkpoint: Checkpoint,
    dtype: str = "auto",
    device: str = "auto",
    *,
    streamed: bool = False,
    **placement: Any,
) -> Any:
    """Loads the model for inference: no parameter requires a gradient.

    dtype: a name of gradmap.model.precision, or auto. device: auto, cpu, cuda, or spread (over all
    GPUs). streamed: only one layer at a time is in memory. placement: for a model that is larger
    than memory and only has to run forward, `from_pretrained`'s arguments that say where weights
    stay. Raises UserError if GPUs cannot hold it.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device, checkpoint)
    if device == SPREAD:
        placement = {"device_map": "auto"}
    with waiting(f"Loading {checkpoint.name}"):
        if streamed:
            model = _load_streamed(checkpoint, dtype, device)
        else:
            model = _load_whole(checkpoint, dtype, device, placement)
    if device == SPREAD and any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"{checkpoint.name} does not fit on the GPUs of this machine together; use --stream."
        )
    # not to be had from the grouped product that mixtures of experts use otherwise
    if dtype == "float64":
        model.set_experts_implementation("eager")
    if dtype == AUTOCAST:
        prepare_for_autocast(model)
    return model.eval().requires_grad_(False)


def _load_whole(checkpoint: Checkpoint, dtype: str, device: str, placement: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory,
        dtype=weights_dtype(dtype),
        use_safetensors=True,
        trust_remote_code=False,
        **placement,
    )
    return model if placement else model.to(device)


def _load_streamed(checkpoint: Checkpoint, dtype: str, device: str) -> Any:
    from gradmap.model.streaming import load_streamed_model

    if device == SPREAD:
        raise UserError(
            "--stream reads one layer at a time for one device; leave out --device spread."
        )
    return load_streamed_model(checkpoint, weights_dtype(dtype), torch.device(device))


def load_tokenizer(directory: Path) -> Any:
    """Raises UserError if the directory has none that transformers can read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} has no usable tokenizer: {first_line(error)}") from None


def resolve_device(device: str) -> str:
    """`auto` is the GPU if there is one; of several processes, each takes its own."""
    if device not in DEVICES and not device.startswith("cuda:"):
        raise UserError(f"Unknown device {device!r}; use {', '.join(DEVICES)}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith(("cuda", SPREAD)) and not torch.cuda.is_available():
        raise UserError(
            f"--device {device} was asked for, but torch sees no GPU here; use --device cpu."
        )
    return local_device() if device == "cuda" else device


def resolve_dtype(dtype: str, device: str, checkpoint: Checkpoint) -> str:
    """`auto` is what the machine computes fastest in without losing what is stored; anything else
    is obeyed.

    Says which, and warns where an explicit choice is slower than float32 is. Raises UserError for
    an unknown one.
    """
    if dtype != "auto":
        weights_dtype(dtype)
        warn_if_slow(dtype, device)
        return dtype
    found = auto_dtype(checkpoint.config, device)
    announce(found, device)
    return found


def auto_dtype(config: dict[str, Any], device: str) -> str:
    """What `auto` is for a model with this config."""
    return fastest_dtype(stored_dtype(config), device)


def stored_dtype(config: dict[str, Any]) -> str:
    """The dtype of a checkpoint's weights, as its config names it."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
