"""Loads DIRECTORY/model.gguf in llama.cpp, on the CPU: run_llama_cpp.py DIRECTORY PROBE OUT.

It reads and writes what export.runners.probe_io does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

GGUF_FILE = "model.gguf"


def main() -> None:
    directory, probe_path, out = map(Path, sys.argv[1:])
    probe = load_file(probe_path)
    input_ids, greedy_tokens = probe["input_ids"], int(probe["greedy_tokens"])
    model = open_model(directory / GGUF_FILE, input_ids.shape[1] + greedy_tokens)
    tensors: dict[str, NDArray[Any]] = {
        "logits": np.stack([score(model, sample) for sample in input_ids]),
        "cached_logits": np.stack(
            [score(model, sample[:-1], sample[-1:])[-1] for sample in input_ids]
        ),
        "greedy_ids": decode_greedily(model, input_ids[0], greedy_tokens),
    }
    runtime = f"llama-cpp-python {llama_cpp.__version__}, CPU"
    save_file(tensors, out, metadata={"runtime": runtime})


def open_model(path: Path, length: int) -> Llama:
    """For texts of so many tokens, with keys and values in float32, so that the weights alone are
    rounded."""
    threads = len(os.sched_getaffinity(0))
    return Llama(
        str(path),
        n_ctx=length,
        n_batch=length,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        logits_all=True,
        verbose=False,
    )


def score(model: Llama, *parts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits (T, V) of a text that is fed in parts of T tokens in all, each behind the others
    through the cache."""
    model.reset()
    for part in parts:
        model.eval(part.tolist())
    return np.array(model.scores[: model.n_tokens])


def decode_greedily(model: Llama, prompt: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """What follows a prompt (T,): (tokens,). Texts end at no token."""
    model.reset()
    ids, feed = [], prompt.tolist()
    for _ in range(tokens):
        model.eval(feed)
        feed = [int(model.scores[model.n_tokens - 1].argmax())]
        ids += feed
    return np.array(ids, dtype=np.int64)


if __name__ == "__main__":
    main()
