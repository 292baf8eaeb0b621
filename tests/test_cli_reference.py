"""docs/cli.md is what the commands say of themselves."""

import re

from gradmap.common import errors
from gradmap.common.verdict import EXIT_CODES
from scripts.write_cli_reference import make_reference
from tests.conftest import ROOT
from tests.test_docs import COMMANDS

PAGE = ROOT / "docs" / "cli.md"


def test_the_page_is_current():
    assert PAGE.read_text() == make_reference(), (
        "run `python -m scripts.write_cli_reference docs/cli.md`"
    )


def test_each_option_of_each_command_has_a_row():
    sections = re.split(r"^## gradmap ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert [section.split("\n")[0] for section in sections] == list(COMMANDS)
    for section, command in zip(sections, COMMANDS.values(), strict=True):
        names = {name for one in command.params for name in [*one.opts, *one.secondary_opts]}
        assert {name for name in names if re.search(rf"{name}[ .`]", section)} == names


def test_a_row_has_the_default_and_the_limits_apart():
    rows = PAGE.read_text().splitlines()
    assert "| `--port <int>` | Port to listen on. | default: 8000 |" in rows
    assert "| `--segment <int range>` | Tokens of a segment of text. | default: 128; x>=2 |" in rows


def test_every_exit_code_is_there():
    listed = re.findall(r"^\| ([\d, ]+) \|", PAGE.read_text(), re.MULTILINE)
    codes = {int(code) for codes in listed for code in codes.split(", ")}
    ours = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert codes == {*ours, *EXIT_CODES.values(), errors.UserError("").exit_code}


def test_a_value_s_kind_is_a_word_and_no_annotation_of_python():
    kinds = re.findall(r"^\| `--[^`]*<([^`]*)>` \|", PAGE.read_text(), re.MULTILINE)
    assert len(kinds) > 50
    assert not [kind for kind in kinds if re.search(r"[.(]", kind)]
