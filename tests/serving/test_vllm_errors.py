"""vLLM's error is found in what it prints: in colours, with its processes' names, and where it
takes several lines."""

import pytest

from serving.vllm_errors import find_error

INVALID = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, max_model_len (9) is greater than 8 [type=value_error, input_value=Args(), input_type=Args]
    For further information visit https://errors.pydantic.dev/2/v/value_error"""  # noqa: E501
WRONG_FIELD = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for CacheConfig
block_size
  Input should be an integer [type=int_parsing, input_value='x', input_type=str]"""
ERRORS = {
    "ValueError: no room": "ValueError: no room",
    "ValueError:\n\n  To serve one request, give more": (
        "ValueError: To serve one request, give more"
    ),
    "AssertionError": "AssertionError",
    INVALID: (
        "ValidationError: 1 validation error for ModelConfig: Value error, max_model_len (9) is "
        "greater than 8"
    ),
    WRONG_FIELD: (
        "ValidationError: 1 validation error for CacheConfig: block_size: Input should be an "
        "integer"
    ),
    "vllm serve: error: unrecognized arguments: --x": "unrecognized arguments: --x",
    "nothing of the kind": None,
}
PREFIXES = (
    "",
    "(APIServer pid=5) ",
    "(EngineCore pid=7) ERROR 11-25 09:14:31 [core.py:9] ",
    "\x1b[0;36m(EngineCore pid=7)\x1b[0;0m \x1b[31mERROR\x1b[0m \x1b[90m11-25 09:14:31\x1b[0m "
    "\x1b[90m[a.py:9]\x1b[0m ",
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("printed", ERRORS)
def test_an_error_is_found_in_colours_and_over_several_lines(printed, prefix):
    before = ["(APIServer pid=5) Traceback (most recent call last):", '  File "x.py", line 1, in f']
    lines = [*before, *(prefix + line for line in printed.splitlines()), "and so on"]
    assert find_error(lines) == ERRORS[printed]
