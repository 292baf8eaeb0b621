"""Service-level objectives, such as `ttft_p95=200ms`: a latency that a share of the requests must
not exceed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradmap.common.errors import UserError
from loadtest.metrics import BY_NAME, OF_REQUESTS, Metric, RequestMetrics

NAMES = tuple(metric.name for metric in OF_REQUESTS)
_UNITS = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Slo:
    """metric: one of NAMES, in open loop counted from the schedule. percentile: of requests;
    limit_s: seconds."""

    metric: str
    percentile: float
    limit_s: float

    @property
    def of(self) -> Metric:
        """The metric that it limits."""
        return BY_NAME[self.metric]

    def holds(self, request: RequestMetrics) -> bool:
        """Whether one request is within the limit; without a value, it is not."""
        values_s = self.of.values([request])
        return bool(values_s) and values_s[0] <= self.limit_s

    def met_by(self, values_s: Sequence[float]) -> bool:
        """Whether the percentile of these values is within the limit; no values meet nothing."""
        return bool(values_s) and float(np.percentile(values_s, self.percentile)) <= self.limit_s


def parse_slo(text: str) -> Slo:
    """`ttft_p95=200ms` -> Slo. Raises UserError."""
    match = re.fullmatch(
        rf"({'|'.join(NAMES)})_p(\d+(?:\.\d+)?)=(\d+(?:\.\d+)?)(ms|s)", text.strip()
    )
    if match is None or not (0 < float(match[2]) <= 100 and 0 < float(match[3]) < math.inf):
        raise UserError(
            f"--slo {text} is not METRIC_pPERCENTILE=LIMIT, such as ttft_p95=200ms or "
            "tpot_p99=0.03s."
        )
    return Slo(match[1], float(match[2]), float(match[3]) * _UNITS[match[4]])
