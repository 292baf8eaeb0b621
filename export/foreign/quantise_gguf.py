"""Has llama.cpp quantise a GGUF file: quantise_gguf.py IN OUT TYPE [IMPORTANCES].

TYPE is one of llama.cpp's own, such as q4_k_m. IMPORTANCES is a safetensors file that has, for
tensors of the file, how much each of their inputs weighs (d_in,), float32.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_float
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Importances = dict[str, NDArray[np.float32]]


def main() -> None:
    given, out, kind, *importances = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.nthread = len(os.sched_getaffinity(0))
    known = load_file(importances[0]) if importances else {}
    params.imatrix = as_imatrix(known)
    failed = llama_cpp.llama_model_quantize(given.encode(), out.encode(), ctypes.byref(params))
    if failed or not Path(out).exists():
        sys.exit(f"llama.cpp cannot write {kind}; what it said stands above")


def as_imatrix(importances: Importances) -> Any:
    """The array of llama_model_imatrix_data that llama.cpp reads, up to an entry without a name;
    None for none."""
    if not importances:
        return None
    entry = llama_cpp.llama_model_imatrix_data
    entries = [
        entry(name.encode(), values.ctypes.data_as(POINTER(c_float)), values.size)
        for name, values in importances.items()
    ]
    return (entry * (len(entries) + 1))(*entries, entry(None, None, 0))


if __name__ == "__main__":
    main()
