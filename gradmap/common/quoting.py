"""Names and messages of others, written where some characters mean something: terminals, Markdown,
XML."""

from __future__ import annotations

import re

_MARKDOWN = re.compile(r"[\\`*_\[\]<>|~#]")
# All that XML 1.0 (2.2) cannot hold, escaped or not.
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def visible(text: str) -> str:
    """The text for terminals: what would move the cursor, change colours or turn the direction of
    writing is spelt out."""
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def markdown(text: str) -> str:
    """The text for a line or a cell of Markdown, which shows it as it is: no markup, no link, and
    nobody is called by it."""
    escaped = _MARKDOWN.sub(r"\\\g<0>", visible(text).replace("\n", " "))
    return escaped.replace("&", "&amp;").replace("@", "&#64;").replace("://", "&#58;//")


def xml_text(text: str) -> str:
    """The text for XML, which is to be escaped besides: without characters that it cannot hold."""
    return _NOT_IN_XML.sub("\ufffd", text)
