"""Options are declared once: the command line has them, and models are written as flags again."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from gradmap.common.errors import UserError
from gradmap.common.flags import flags_of
from gradmap.common.options import Name, checked_options, takes
from gradmap.common.reading import Strict
from gradmap.evaluation.options import EvalOptions


class Wishes(Strict):
    count: int = Field(3, ge=1, description="How many.")
    share: Annotated[float, Field(gt=0)] | None = Field(
        None, description="How much.", json_schema_extra={"cure": "give more than nothing"}
    )
    kind: Literal["left", "right"] = Field("left", description="Which.")
    places: list[int] = Field(default_factory=list, description="Where.")
    names: list[Name] = Field(["all"], json_schema_extra={"flag": "--name"}, description="Who.")
    texts: list[str] = Field(default_factory=list, description="With commas in them.")
    sources: dict[str, str] = Field(default_factory=dict)
    quiet: bool = Field(False, description="Off where nothing is said.")
    check: bool = Field(True, description="On where nothing is said.")
    where: Path | None = None


class Needs(Strict):
    numbers: list[float] = Field(description="Some.")


def read(*arguments: str, kind: type[Strict] = Wishes) -> Strict:
    """What a command gets of it."""
    seen: list[Strict] = []
    app = typer.Typer()

    @app.command()
    @takes(kind)
    def command(options: Strict, other: int = 0) -> None:
        seen.append(options)

    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0]


def test_what_is_not_said_is_the_default():
    assert read() == Wishes()


def test_of_numbers_and_names_several_may_stand_in_one_option():
    asked = read("--places", "3,1", "--places=2", "--name=a,b", "--name", "c", "--texts", "x,y")
    assert asked == Wishes(places=[3, 1, 2], names=["a", "b", "c"], texts=["x,y"])
    assert read("--numbers=1.5,2", kind=Needs) == Needs(numbers=[1.5, 2.0])


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"count": 3},
        {"count": 7, "share": 0.5, "kind": "right", "where": "a/b"},
        {"places": [4, 2], "names": ["x", "y"], "texts": ["--z=1,2", "b c"]},
        {"quiet": True, "check": False},
        {"quiet": False, "check": True},
    ],
)
def test_flags_say_what_a_model_says(wishes):
    asked = Wishes(**wishes)
    assert read(*flags_of(asked)) == asked


def test_what_is_said_is_passed_on_though_it_is_the_default():
    """A default may change while a recipe stays."""
    assert flags_of(Wishes(count=3)) == ["--count=3"]


def test_texts_have_names_or_are_their_own():
    texts = {"mine": "file:a.txt", "file:b.txt": "file:b.txt"}
    flags = flags_of(EvalOptions(perplexity=texts))
    assert flags == ["--perplexity=mine=file:a.txt", "--perplexity=file:b.txt"]
    assert read(*flags, kind=EvalOptions) == EvalOptions(perplexity=texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--share", "0"), "--share is 0.0; give more than nothing"),
        (("--places", "1,b"), "--places is 1,b; give whole numbers with commas between them"),
    ],
)
def test_what_is_wrong_is_said_by_the_option(arguments, message):
    with pytest.raises(UserError, match=message):
        read(*arguments)


def test_an_option_that_is_not_there_is_named():
    with pytest.raises(UserError, match="colour: extra inputs are not permitted"):
        checked_options(Wishes, {"colour": "red"})
