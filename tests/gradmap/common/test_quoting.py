"""Names of others do nothing but be shown."""

import sys
from xml.etree import ElementTree

import pytest
import typer

from gradmap import cli
from gradmap.common import console
from gradmap.common.errors import EXIT_USAGE, UserError
from gradmap.common.quoting import markdown, visible, xml_text

CONTROL = [
    *map(chr, [*range(0x20), *range(0x7F, 0xA0)]),
    "\u2028",
    "\u2029",
    "\u202e",
    "\u200b",
    "\ud800",
    "\ufeff",
]


@pytest.mark.parametrize("character", CONTROL)
def test_no_control_character_reaches_a_terminal(character):
    shown = visible(f"a{character}b")
    assert shown == (
        "a\nb" if character == "\n" else f"a{character.encode('unicode_escape').decode()}b"
    )
    shown.encode()


def test_messages_and_tables_are_shown_without_control_characters(capsys, monkeypatch):
    console.say("a\x1b[31mb")
    console.print_table("t\x1b]0;x\x07", ("", "c\x1b"), [("r\x9b", "1\x1b")])
    app = typer.Typer()

    @app.command()
    def fail():
        raise UserError("no\x1b[31m file")

    monkeypatch.setattr("sys.argv", ["gradmap"])
    assert cli.run_app(app) == EXIT_USAGE
    shown = capsys.readouterr()
    assert "a\\x1b[31mb" in shown.err and "Error: no\\x1b[31m file" in shown.err
    assert all(text in shown.out for text in ("t\\x1b]0;x\\x07", "c\\x1b", "r\\x9b", "1\\x1b"))
    assert not {"\x1b", "\x07", "\x9b"} & {*shown.err, *shown.out}


def test_what_is_printable_is_shown_as_it_is():
    text = "TPOT 1.28x (95% interval 1.20-1.36), größer, 模型, 🙂"
    assert visible(text) == xml_text(text) == text


def test_markdown_has_no_markup_of_others():
    assert markdown("a|b") == r"a\|b"
    assert markdown("<img src=x>") == r"\<img src=x\>"
    assert markdown("[x](http://evil) @team `c` **b** _i_") == (
        r"\[x\](http&#58;//evil) &#64;team \`c\` \*\*b\*\* \_i\_"
    )
    assert markdown("one\ntwo &amp;") == "one two &amp;amp;"
    assert markdown("\x1b[31m") == r"\\x1b\[31m"


def test_xml_holds_every_character_that_is_left():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    element = ElementTree.Element("a", b=xml_text(everything))
    read = ElementTree.fromstring(ElementTree.tostring(element, encoding="unicode"))
    # attributes escape line feeds and tabs, so that all but what is no character of XML comes back
    assert len(read.get("b")) == len(everything)
    assert (
        read.get("b")[0x41] == "A"
        and read.get("b")[0x1B] == "\ufffd"
        and read.get("b")[0xD800] == "\ufffd"
    )
