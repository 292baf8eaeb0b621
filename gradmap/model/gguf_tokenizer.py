"""The tokenizer of a GGUF file: what the file says about it, how it is loaded, and what shows that
nothing was lost.

transformers builds the tokenizer from the file's vocabulary, and leaves out some of what llama.cpp
reads beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gradmap.common.errors import UserError

SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"  # tokenizer.ggml.model
SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# After any of these llama.cpp stops: at the end of the text, of a turn of a chat, of a message to a
# tool.
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
# tokenizer.ggml.pre, as llama.cpp's llama-vocab.cpp understands it:
# every digit is cut off by itself before the rest is cut as GPT-2 does it;
SINGLE_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
# a word that the vocabulary has whole is taken whole, and texts begin with BOS even if the file
# does not say so.
WHOLE_WORDS = frozenset(
    {
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "tekken",
    }
)
# Words, runs of spaces, digits after them, other scripts, line ends: where tokenizers that are
# nearly right differ.
SAMPLE_TEXTS = (
    "The capital of France is",
    " In 1999,  12345 people paid $3.50; it's 42%.",
    "naïve café\n\n\tdef f(x):\r\n        return x\n ",
    "日本語 🙂 Привет",
)


@dataclass(frozen=True)
class TokenizerSettings:
    """What a GGUF file's metadata says beside the vocabulary.

    kind: SENTENCEPIECE or BYTE_LEVEL. splitting: the name of how text is cut before merges, if it
    has one. add_bos, add_eos: whether a text begins and ends with those tokens. special_ids:
    `bos_token` and so on, to ids. end_ids: the tokens after which a generation ends, each once.
    """

    kind: str
    splitting: str | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    special_ids: dict[str, int]
    end_ids: tuple[int, ...]
    chat_template: str | None


def read_settings(source: Path) -> TokenizerSettings:
    """Raises ValueError if the file is no GGUF file."""
    return settings_of(read_metadata(source))


def read_metadata(source: Path) -> dict[str, Any]:
    """The file's metadata without its long arrays of strings. Raises ValueError if it is no GGUF
    file."""
    return read_header(source)[0]


def read_header(source: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The metadata of a GGUF file, and the names of its tensors."""
    # gguf.GGUFReader takes seconds for a vocabulary
    from transformers.integrations.gguf import (
        read_gguf_metadata,
    )

    header: tuple[dict[str, Any], tuple[str, ...]] = read_gguf_metadata(str(source))
    return header


def settings_of(metadata: dict[str, Any]) -> TokenizerSettings:
    """Where the file is silent, llama.cpp's defaults hold."""

    def setting(name: str, default: Any) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    kind, splitting = setting("model", BYTE_LEVEL), setting("pre", None)
    ids = {token: setting(name, None) for token, name in SPECIAL_TOKENS.items()}
    ends = [setting(name, None) for name in END_TOKENS]
    return TokenizerSettings(
        kind=kind,
        splitting=splitting,
        add_bos=bool(setting("add_bos_token", kind == SENTENCEPIECE or splitting in WHOLE_WORDS)),
        add_eos=bool(setting("add_eos_token", False)),
        add_space_prefix=bool(setting("add_space_prefix", True)),
        special_ids={token: int(index) for token, index in ids.items() if index is not None},
        end_ids=tuple(dict.fromkeys(int(index) for index in ends if index is not None)),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def load_gguf_tokenizer(source: Path) -> Any:
    """The tokenizer as the file describes it. Raises ValueError where transformers cannot read
    it."""
    from transformers import AutoTokenizer

    settings = read_settings(source)
    with TemporaryDirectory() as alone:
        # where a tokenizer_config.json lies beside it, transformers takes half of that
        (Path(alone) / source.name).symlink_to(source.resolve())
        tokenizer = AutoTokenizer.from_pretrained(
            alone,
            gguf_file=source.name,
            add_bos_token=settings.add_bos,
            add_eos_token=settings.add_eos,
        )
    _restore_splitting(tokenizer.backend_tokenizer, settings)
    return tokenizer


def _restore_splitting(backend: Any, settings: TokenizerSettings) -> None:
    """Cuts a text as the file says: transformers' reader knows some of the ways, and would cut as
    GPT-2 or Llama do for the others."""
    from tokenizers import decoders, pre_tokenizers

    if settings.splitting in SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    if settings.splitting in WHOLE_WORDS:
        backend.model.ignore_merges = True
    if not settings.add_space_prefix and isinstance(
        backend.pre_tokenizer, pre_tokenizers.Metaspace
    ):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


def require_same_tokens(tokenizer: Any, source: Path) -> None:
    """Raises UserError unless a tokenizer does what a GGUF file says, and what llama.cpp does if it
    is installed."""
    problem = find_problem(tokenizer, read_settings(source))
    if problem is None and find_spec("llama_cpp") is not None:
        problem = find_difference(tokenizer, source)
    if problem is not None:
        raise UserError(f"The tokenizer is not that of {source}: {problem}; nothing was written.")


def find_problem(tokenizer: Any, settings: TokenizerSettings) -> str | None:
    """Says in words what a tokenizer has lost of a GGUF file's settings; None if nothing."""
    for token, expected in settings.special_ids.items():
        found = getattr(tokenizer, f"{token}_id")
        if found != expected:
            return f"its {token} is {found}, where the file has {expected}"
    if settings.chat_template is not None and tokenizer.chat_template != settings.chat_template:
        return "its chat template is another"
    for text in SAMPLE_TEXTS:
        expected_ids = _frame(_encode(tokenizer, text, plain=True), settings)
        if difference := _describe_difference(_encode(tokenizer, text), expected_ids):
            return f"{text!r} becomes {difference} by the file's settings"
    return None


def find_difference(tokenizer: Any, source: Path) -> str | None:
    """Compares with the tokens that llama.cpp itself makes of the sample texts."""
    from llama_cpp import Llama

    llama = Llama(model_path=str(source), vocab_only=True, verbose=False)
    for text in SAMPLE_TEXTS:
        expected = llama.tokenize(text.encode(), add_bos=True, special=True)
        if difference := _describe_difference(_encode(tokenizer, text), list(expected)):
            return f"{text!r} becomes {difference} in llama.cpp"
    return None


def _encode(tokenizer: Any, text: str, plain: bool = False) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=not plain, verbose=False)["input_ids"]
    return ids


def _frame(ids: list[int], settings: TokenizerSettings) -> list[int]:
    """Token ids with the BOS before and the EOS behind them that the settings ask for, where there
    are such tokens."""
    bos, eos = settings.special_ids.get("bos_token"), settings.special_ids.get("eos_token")
    begin = [bos] if settings.add_bos and bos is not None else []
    end = [eos] if settings.add_eos and eos is not None else []
    return [*begin, *ids, *end]


def _describe_difference(found: list[int], expected: list[int]) -> str | None:
    """What differs in two lists of token ids, from the first difference on; None if nothing
    does."""
    if found == expected:
        return None
    pairs = enumerate(zip_longest(found, expected))
    start = next(index for index, (made, wanted) in pairs if made != wanted)
    few = slice(start, start + 4)
    return f"tokens {found[few]} from number {start} on, but {expected[few]}"
