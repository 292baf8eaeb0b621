"""What `gradmap-serve` can be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from gradmap.common.reading import Strict


class ServeOptions(Strict):
    """balancer_wait_s: seconds between not ready and stopping, for balancers to notice; None for 5,
    or 0 on loopback."""

    compare: bool = Field(False, description="Serve two: DENSE at --port, PRUNED at the next.")
    host: str = Field(
        "127.0.0.1", description="Address to listen on; loopback unless you say otherwise."
    )
    port: int = Field(8000, description="Port to listen on.")
    admin_host: str = Field("127.0.0.1", description="Address for probes and metrics.")
    admin_port: int | None = Field(None, description="Port for probes and metrics; --port + 1000.")
    api_key_file: Path | None = Field(
        None, description="Clients need the key in it; or set VLLM_API_KEY."
    )
    allow_anonymous: bool = Field(
        False, description="Serve a public address even if there is no key, nor its file."
    )
    tls_certificate: Path | None = Field(None, description="PEM file; serves https.")
    tls_key: Path | None = Field(None, description="PEM file of its private key.")
    verify: bool = Field(True, description="Compare the artifact's files with their hashes first.")
    require_artifact: bool = Field(
        False, description="Refuse a directory that gradmap did not export."
    )
    expect_sha256: list[str] = Field(
        default_factory=list,
        description="SHA-256 of the artifact's gradmap.json; with --compare, one of each.",
    )
    restarts: int = Field(
        3, ge=0, description="How often in a row a server that fails is restarted."
    )
    drain_s: int = Field(
        20, ge=0, description="Seconds that requests may go on when asked to stop."
    )
    balancer_wait_s: float | None = Field(
        None, ge=0, description="Seconds between not ready and stopping; 5, or 0 on loopback."
    )
    ready_timeout_s: float = Field(
        900.0, description="Give up if no request was completed by then."
    )
    log: str | None = Field(None, description="File for vLLM's output, - for stderr; in the cache.")
    log_format: Literal["text", "json"] = Field(
        "text", description="Plain lines, or a JSON object per line."
    )
