"""What the documentation says exists: links, commands and their options, recipes, pages, targets of
make."""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.exceptions import TyperException

from benchmarks.__main__ import BENCHMARKS
from gradmap.cli import build_app
from gradmap.common.errors import UserError
from loadtest.pipeline.recipe import load_recipe
from serving.cli import split_arguments
from tests.conftest import ROOT
from tests.test_layering import LAYERS

DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")),
]
COMMANDS: dict[str, Any] = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]
# What may stand before a program: variables, and programs that run another.
PREFIX = re.compile(
    r"^(\$ |- |\s|run: |RUN |[A-Z_]+=\S* |nohup |exec |time |timeout \S+ |nice( -n \d+)? )+"
)
FENCE = re.compile(r"^( *)```.*?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
DIAGRAM = re.compile("[─│►▼]")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"^[A-Z][A-Z0-9_]*$")
DOTS = ("...", "…")


def fenced_blocks(text: str) -> list[str]:
    return [match[2] for match in FENCE.finditer(text)]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def code_spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def command_lines(text: str) -> Iterator[str]:
    """The lines of the fenced blocks, whole where one goes on behind a backslash, without comments
    and diagrams."""
    for block in fenced_blocks(text):
        if not DIAGRAM.search(block):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                yield re.sub(r"(^|\s)#.*", "", line).strip()


def our_arguments(line: str) -> list[list[str]]:
    """Of every command of ours in a line of shell: the subcommand and its arguments."""
    if not re.search(r"\bgradmap\b", line):
        return []
    lexer = shlex.shlex(PREFIX.sub("", line), posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    commands: list[list[str]] = [[]]
    for token in lexer:
        if set(token) <= set(";|&<>"):
            commands.append([])
        else:
            commands[-1].append(token)
    return [found for command in commands if (found := _strip_program(command)) is not None]


def _strip_program(tokens: list[str]) -> list[str] | None:
    """None for a program that is not ours."""
    while tokens and re.fullmatch(r"[A-Z_]+=.*", tokens[0]):
        tokens = tokens[1:]
    program = Path(tokens[0]).name if tokens else ""
    if program == "gradmap":
        return tokens[1:]
    if program == "gradmap-serve":
        return ["serve", *tokens[1:]]
    launched = program.startswith(("python", "torchrun", "accelerate"))
    places = [
        place
        for place, pair in enumerate(pairwise(tokens))
        if launched and pair == ("-m", "gradmap")
    ]
    return tokens[places[0] + 2 :] if places else None


def find_problem(arguments: list[str], partial: bool = False) -> str | None:
    """Why the command line would be refused; None if it would not. partial: something may be left
    out.

    Words in capitals stand for something, and dots for the rest.
    """
    if not arguments:
        return None  # the help
    name, *rest = arguments
    if name not in COMMANDS:
        return None if name in DOTS else f"no subcommand {name!r}"
    filled = [PLACEHOLDER.sub("1", one) for one in rest if one not in DOTS]
    command = COMMANDS[name]
    try:
        if partial or len(filled) < len(rest):
            command.make_parser(command.context_class(command, info_name=name)).parse_args(
                args=filled
            )
            return None
        given = command.make_context(name, filled).params
        if name == "serve":
            split_arguments(given["directories"], 2 if given["compare"] else 1)
    except TyperException as error:
        return error.format_message()
    except UserError as error:
        return str(error)
    return None


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub and as mkdocs make them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", prose(path.read_text()), re.MULTILINE)
    github = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return github & {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", one.lower()).strip()) for one in headings
    }


def nav_pages(entry: object) -> Iterator[str]:
    for one in (
        entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ()
    ):
        if isinstance(one, str):
            yield one
        else:
            yield from nav_pages(one)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(prose(page.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        # mkdocs --strict refuses what is not below docs
        assert DOCS not in page.parents or path.is_relative_to(DOCS), (
            f"{page.name}: {target} is outside docs"
        )
        assert not anchor or anchor in anchors(path), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken_by_the_command_line(page):
    text = page.read_text()
    for line in command_lines(text):
        for arguments in our_arguments(line):
            assert find_problem(arguments) is None, (
                f"{page.name}: {line}: {find_problem(arguments)}"
            )
    for span in code_spans(text):
        for arguments in our_arguments(span) if re.match(r"(gradmap|gradmap-serve) ", span) else ():
            assert find_problem(arguments, partial=True) is None, (
                f"{page.name}: {span}: {find_problem(arguments)}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_targets_and_recipes_exist(page):
    text = page.read_text()
    code = "\n".join([*command_lines(text), *code_spans(text)])
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for names in re.findall(r"^make ((?:[a-z-]+ ?)+)", code, re.MULTILINE)
        for target in names.split()
    }
    assert named <= targets, f"{page.name}: make {named - targets}"
    for module in re.findall(
        r"-m ((?:benchmarks|scripts|export|serving|loadtest)\.[\w.]*\w)", code
    ):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), (
            f"{page.name}: {module}"
        )
    for recipe in re.findall(r"\brecipes/[\w.-]+\.yaml", code):
        assert (ROOT / recipe).is_file(), f"{page.name}: {recipe}"


def test_the_readme_is_short_enough_to_be_read():
    assert (ROOT / "README.md").stat().st_size <= 9216  # bytes; what is longer goes into docs


def test_every_benchmark_is_described():
    """Those of `make bench` have a star."""
    page = (DOCS / "benchmarks.md").read_text()
    described = dict(re.findall(r"^\| `benchmarks\.(\w+)`( \*)? \|", page, re.MULTILINE))
    programs = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if "typer.run(main)" in path.read_text()
    }
    assert described.keys() == programs - {"__main__", "fake_endpoint"}
    assert {name for name, star in described.items() if star} == BENCHMARKS.keys()


def test_quoted_messages_are_in_the_code():
    """Dots stand for what is filled in."""
    sources = [path.read_text() for name in LAYERS for path in (ROOT / name).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    pieces = [piece.strip() for row in rows for piece in row.split("…") if len(piece.strip()) > 1]
    assert len(rows) > 50
    assert not [piece for piece in pieces if piece not in code]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").iterdir()), ids=lambda path: path.name)
def test_recipes_load(path):
    recipe = load_recipe(path)
    assert (recipe.prune.remove is None) != (recipe.prune.ratio is None)


def test_every_page_is_in_the_navigation_once():
    nav = list(nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("gradmap prune --model M --remove K --out plan # why", None),
        ("X=1 gradmap verify DIR && gradmap-serve DIR --port 8000 -- --max-model-len 4096", None),
        ("torchrun --nproc-per-node 4 -m gradmap prune ...", None),
        ("docker build -t gradmap . && docker run gradmap --nothing", None),
        ("gradmap prune --model M --solver adam --out plan", "No such option: --solver"),
        ("python -m gradmap prune --model M --remove 4", "Missing"),
        ("gradmap prune --model M --remove four --out plan", "integer"),
        ("gradmap prune --nothing ...", "No such option: --nothing"),
        ("gradmap verify DIR && gradmap shrink", "no subcommand 'shrink'"),
        ("gradmap-serve DIR -- --port 8000", "--port comes before --"),
        ("gradmap-serve --compare DIR", "Name 2 model directories"),
    ],
)
def test_wrong_commands_are_found(line, problem):
    (stripped,) = command_lines(f"```\n{line}\n```\n")
    problems = [
        found
        for arguments in our_arguments(stripped)
        if (found := find_problem(arguments)) is not None
    ]
    assert problem in problems[0] if problem else not problems
