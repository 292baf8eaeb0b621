"""Why a program of ours failed is said in one line."""

import sys

import pytest

from export.verification import run_child
from gradmap.common.errors import UserError

PYDANTIC = """
from pydantic import BaseModel, field_validator
class ModelConfig(BaseModel):
    length: int
    @field_validator("length")
    def check(cls, value):
        raise ValueError("length 65 is beyond the model's 64")
ModelConfig(length=65)
"""
CHAINED = """
try:
    raise KeyError("first")
except KeyError as error:
    raise ValueError("the file is cut off\\nSee the manual.") from error
"""


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            PYDANTIC,
            r"1 validation error for ModelConfig: length: "
            r"Value error, length 65 is beyond the model's 64$",
        ),
        (CHAINED, r"^It failed: ValueError: the file is cut off$"),
        ("import sys; sys.exit('Error: no room')", r"^It failed: Error: no room$"),
        ("import sys; sys.exit(3)", r"^It failed: no message$"),
    ],
)
def test_the_reason_is_found_in_what_it_printed(script, reason):
    with pytest.raises(UserError, match=reason):
        run_child([sys.executable, "-c", script], "It failed")
