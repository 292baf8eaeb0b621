"""The formats of artifacts, one to a module: nothing outside of it asks for a format by its name.

A new one is a module here, a line in FORMATS and, where a runtime is new, a program in
export.runners.
"""

from __future__ import annotations

from export.formats.format import Format
from export.formats.gguf import GGUF
from export.formats.hf import HF
from export.formats.onnx import ONNX
from export.formats.onnx_genai import ONNX_GENAI
from export.formats.vllm import VLLM

FORMATS: dict[str, Format] = {form.name: form for form in (HF, VLLM, ONNX, ONNX_GENAI, GGUF)}
# What `gradmap run` serves: the one of those vLLM reads that tells it how.
SERVED_FORMAT = VLLM.name
