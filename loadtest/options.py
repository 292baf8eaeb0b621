"""What `gradmap loadtest` can be asked for, on the command line and in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from gradmap.common.errors import UserError
from gradmap.common.reading import Strict
from gradmap.common.wording import listed
from loadtest.arrivals import ARRIVALS, DEFAULT_ARRIVALS, Arrivals

DENSE, PRUNED = "dense", "pruned"
# The TPOT speed-up that a verdict asks for, unless another one is given.
REQUIRED_SPEED_UP = 1.0
PAIRS_FOR_A_VERDICT, QUICK_PAIRS = 6, 3
# Below, TPOT is undefined.
LEAST_OUTPUT_TOKENS = 2


def _written_slo(text: str) -> str:
    from loadtest.slo import parse_slo

    try:
        parse_slo(text)
    except UserError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return text


class LoadTestOptions(Strict):
    """What of it is the same for any two models."""

    quick: bool = Field(
        False, description="3 pairs, one server start per model; cannot end in PASS."
    )
    require_speedup: PositiveFloat = Field(
        REQUIRED_SPEED_UP, description="TPOT speed-up that the verdict asks for."
    )
    pairs: int | None = Field(
        None,
        ge=1,
        description=f"Pairs of dense and pruned blocks ({PAIRS_FOR_A_VERDICT}, with --quick "
        f"{QUICK_PAIRS}).",
    )
    concurrency: list[PositiveInt] = Field(
        [1, 8], description="Requests in flight; may be given several times (1 and 8)."
    )
    rate: list[PositiveFloat] = Field(
        default_factory=list,
        description="Requests a second, in an open loop; may be given several times.",
    )
    arrivals: Arrivals = Field(
        DEFAULT_ARRIVALS, description=f"Of an open loop: {listed(list(ARRIVALS), 'or')}."
    )
    open_loop_s: PositiveFloat = Field(20.0, description="Length of an open loop, in seconds.")
    slo: list[Annotated[str, AfterValidator(_written_slo)]] = Field(
        default_factory=list,
        description="Such as ttft_p95=200ms or tpot_p95=30ms; may be given several times.",
    )
    find_rate: bool = Field(
        False, description="Look for the highest rate of each model that meets the SLOs."
    )
    requests: PositiveInt = Field(8, description="Requests per block and load, at least.")
    prompt_tokens: PositiveInt = Field(
        128, description="Random token ids per prompt; of texts, at most."
    )
    output_tokens: int = Field(
        64,
        ge=LEAST_OUTPUT_TOKENS,
        description="Tokens generated per request; of ShareGPT, at most.",
    )
    length_spread: float = Field(
        0.0, ge=0, lt=1, description="Both lengths vary by up to this share."
    )
    shared_prefix: int = Field(0, ge=0, description="So many first tokens are the same in a load.")
    prompts: str | None = Field(
        None,
        description="Texts in place of random tokens: a SPEC as for --calibration, or "
        "sharegpt:PATH.",
    )
    seed: int = Field(0, description="Draws prompts, arrivals and the order of the blocks.")
    vllm_flag: list[str] = Field(
        default_factory=list, description="A flag for vLLM, as --vllm-flag=--enforce-eager."
    )
    processes: PositiveInt = Field(
        1, description="That send requests: Locust workers on this machine."
    )
    against: Path | None = Field(
        None,
        description="report.json of an earlier test: FAIL where a speed-up is surely lower now.",
    )
