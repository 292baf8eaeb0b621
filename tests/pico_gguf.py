"""Random Llama models of two layers as GGUF files, written by the package gguf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from transformers.convert_slow_tokenizer import bytes_to_unicode

HIDDEN, FFN, LAYERS, HEADS = 32, 64, 2, 4
UNK, BOS, EOS = 0, 1, 2
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["▁", *map(chr, range(33, 127)), "▁t", "▁th", "▁the"]
ALPHABET = [*bytes_to_unicode().values()]
WORDS = ["Ġt", "12", "is"]  # "is" has no merge
MERGES = ["Ġ t", "1 2"]
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


def write_gguf(
    path: Path,
    kind: str = "llama",
    head: Any = None,
    metadata: dict[str, Any] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda tensors: None,
    **settings: Any,
) -> Path:
    """kind: of the tokenizer, llama (SentencePiece) or gpt2 (byte-level BPE).

    head: None (tied), or a pair of GGML types, of the head and of the embeddings that it is stored
    apart from; a third element is the distance of the head from the embeddings. metadata: further
    keys. change: of the tensors, which are values and GGML type by name. settings: of the
    tokenizer, as the file names them.
    """
    writer = GGUFWriter(path, "llama")
    _add_sizes(writer)
    tokens = _add_vocabulary(writer, kind)
    for name, value in settings.items():
        _add_setting(writer, name, value)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    tensors = _tensors(len(tokens), head)
    change(tensors)
    for name, (values, stored) in tensors.items():
        if stored == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: GGUFWriter) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)


def _add_vocabulary(writer: GGUFWriter, kind: str) -> list[str]:
    pieces = [*BYTES, *LETTERS] if kind == "llama" else [*ALPHABET, *WORDS]
    tokens = [*SPECIAL, *pieces]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    byte_types = [TokenType.BYTE if piece in BYTES else TokenType.NORMAL for piece in pieces]
    writer.add_token_types([TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *byte_types])
    if kind == "llama":
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
    else:
        writer.add_token_merges(MERGES)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNK)
    return tokens


def _add_setting(writer: GGUFWriter, name: str, value: Any) -> None:
    key = {"chat_template": "tokenizer.chat_template", "license": "general.license"}.get(
        name, f"tokenizer.ggml.{name}"
    )
    _add(writer, key, value)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    kinds[type(value)](key, value)


def _tensors(vocabulary: int, head: Any) -> dict[str, tuple[np.ndarray, GGMLQuantizationType]]:
    """Values and GGML type by name."""
    generator = np.random.default_rng(7)

    def noise(*shape: int) -> np.ndarray:
        return (0.1 * generator.standard_normal(shape)).astype(np.float32)

    full = GGMLQuantizationType.F32
    embeddings = noise(vocabulary, HIDDEN)
    tensors = {
        "token_embd.weight": (embeddings, full),
        "output_norm.weight": (1 + noise(HIDDEN), full),
    }
    if head is not None:
        head_type, embedding_type, *distance = head
        apart = distance[0] * noise(vocabulary, HIDDEN) if distance else 0
        tensors["token_embd.weight"] = embeddings, embedding_type
        tensors["output.weight"] = embeddings + apart, head_type
    for layer in range(LAYERS):
        shapes = {f"attn_{one}": (HIDDEN, HIDDEN) for one in ("q", "k", "v", "output")}
        shapes |= {"ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}
        tensors |= {
            f"blk.{layer}.{name}.weight": (noise(*shape), full) for name, shape in shapes.items()
        }
        norms = ("attn_norm", "ffn_norm")
        tensors |= {f"blk.{layer}.{name}.weight": (1 + noise(HIDDEN), full) for name in norms}
    return tensors
