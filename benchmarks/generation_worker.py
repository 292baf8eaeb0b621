"""Generates with one artifact in one runtime whenever it is told to: a line on stdin, a JSON line
back.

    python -m benchmarks.generation_worker RUNTIME DIRECTORY THREADS PROMPT_TOKENS NEW_TOKENS

Each answer holds `prefill_s`, until the first token, and `decode_s`, for the others. Every run is
the same greedy continuation of the same random prompt, without a cached prefix.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.runners.probe_io import Step, transformers_step
from export.runners.run_vllm import ENVIRONMENT

Generate = Callable[[int], None]


def main() -> None:
    runtime, directory, threads, prompt_tokens, new_tokens = sys.argv[1:]
    prompt = torch.randint(
        3, 200, (1, int(prompt_tokens)), generator=torch.Generator().manual_seed(0)
    )
    generate = LOADERS[runtime](Path(directory), int(threads), prompt, int(new_tokens))
    generate(int(new_tokens))  # what is compiled or allocated at the first use
    print("ready", flush=True)
    for _ in sys.stdin:
        prefill_s = measure(generate, 1)
        total_s = measure(generate, int(new_tokens))
        print(json.dumps({"prefill_s": prefill_s, "decode_s": total_s - prefill_s}), flush=True)


def measure(generate: Generate, tokens: int) -> float:
    started = time.perf_counter()
    generate(tokens)
    return time.perf_counter() - started


def load_transformers(directory: Path, threads: int, prompt: Tensor, new_tokens: int) -> Generate:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return repeat(transformers_step(AutoModelForCausalLM.from_pretrained(directory).eval()), prompt)


def load_onnx(directory: Path, threads: int, prompt: Tensor, new_tokens: int) -> Generate:
    from gradmap.runtimes.onnx_session import OnnxCausalLM

    model = OnnxCausalLM(directory, threads)

    def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        logits, longer = model.step(ids.numpy(), cache)
        return torch.from_numpy(logits[:, -1]), longer

    return repeat(step, prompt)


def load_genai(directory: Path, threads: int, prompt: Tensor, new_tokens: int) -> Generate:
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(directory))
    config.overlay(
        json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}})
    )
    model = onnxruntime_genai.Model(config)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=prompt.shape[1] + new_tokens, do_sample=False)

    def generate(tokens: int) -> None:
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt.int().numpy())
        for _ in range(tokens):
            generator.generate_next_token()

    return generate


def load_vllm(directory: Path, threads: int, prompt: Tensor, new_tokens: int) -> Generate:
    os.environ |= ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    from vllm import LLM, SamplingParams

    length = prompt.shape[1] + new_tokens
    engine = LLM(
        str(directory), max_model_len=length, enable_prefix_caching=False, skip_tokenizer_init=True
    )

    def generate(tokens: int) -> None:
        sampling = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        engine.generate([{"prompt_token_ids": prompt[0].tolist()}], sampling, use_tqdm=False)

    return generate


def repeat(step: Step, prompt: Tensor) -> Generate:
    """Generates greedily behind the prompt (1, T); step gives logits (1, vocabulary)."""

    def generate(tokens: int) -> None:
        feed, cache = prompt, None
        for _ in range(tokens):
            logits, cache = step(feed, cache)
            feed = logits.argmax(-1, keepdim=True)

    return generate


LOADERS = {"hf": load_transformers, "onnx": load_onnx, "onnx-genai": load_genai, "vllm": load_vllm}

if __name__ == "__main__":
    main()
