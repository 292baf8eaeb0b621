"""Whether a model can chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradmap.common.reading import read_json_object
from serving.flags import flag_value

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILE = "tokenizer_config.json"


def has_chat_template(directory: Path, vllm_flags: Sequence[str]) -> bool:
    """True if vLLM finds a template with which it makes one prompt of a chat's messages. Without
    one it answers every request at /v1/chat/completions with an error."""
    if flag_value(vllm_flags, "--chat-template") is not None:
        return True
    if any((directory / name).is_file() for name in TEMPLATE_FILES):
        return True
    settings = directory / TOKENIZER_FILE
    return settings.is_file() and bool(read_json_object(settings).get("chat_template"))
