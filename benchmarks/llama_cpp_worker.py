"""`benchmarks.generation_worker` for llama.cpp, run by the Python of the environment where that is.

llama_cpp_worker.py RUNTIME DIRECTORY THREADS PROMPT_TOKENS NEW_TOKENS
"""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main() -> None:
    _, directory, *numbers = sys.argv[1:]
    threads, prompt_tokens, new_tokens = map(int, numbers)
    model = Llama(
        str(Path(directory, "model.gguf")),
        n_ctx=prompt_tokens + new_tokens,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    prompt = np.random.default_rng(0).integers(3, 200, prompt_tokens).tolist()
    generate(model, prompt, new_tokens)  # what is allocated at the first use
    print("ready", flush=True)
    for _ in sys.stdin:
        prefill_s = generate(model, prompt, 1)
        decode_s = generate(model, prompt, new_tokens) - prefill_s
        print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s}), flush=True)


def generate(model: Llama, prompt: list[int], tokens: int) -> float:
    """Seconds for so many tokens behind the prompt. Nothing is cached, and no token ends it."""
    model.reset()
    started = time.perf_counter()
    assert len(list(islice(model.generate(prompt, top_k=1, temp=0.0), tokens))) == tokens
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
