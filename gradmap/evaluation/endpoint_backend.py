"""Scores with the model behind an OpenAI-compatible server of vLLM, through its
`prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from gradmap.common.errors import UserError
from gradmap.evaluation.backends import IsDone, Score, ScoreRequest, never
from gradmap.evaluation.vllm_backend import score_of_logprobs
from gradmap.runtimes.openai_api import open_client, served_model

REQUESTS_IN_FLIGHT = 16
TIMEOUT_S = 300.0
# Where a request says nothing, the server takes the penalties of the model's
# generation_config.json.
GREEDY = {
    "temperature": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class EndpointBackend:
    """Scores with a server. url: of the server, without /v1. The key is read from VLLM_API_KEY."""

    name = "endpoint"

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = open_client(url, TIMEOUT_S)
        try:
            self.model = served_model(self._client)
            described = self._client.get("/v1/models").json()["data"][0]
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise UserError(
                f"No OpenAI-compatible server answers at {url} ({error}); check the URL."
            ) from None
        if not described.get("max_model_len"):
            raise UserError(
                f"The server at {url} does not say how long its sequences may be; it has to be "
                "vLLM's."
            )
        # A sequence holds the whole request, and one generated token.
        self.max_tokens = int(described["max_model_len"]) - 2
        self.vocabulary: int | None = None
        self.end_tokens: tuple[int, ...] = ()

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        with ThreadPoolExecutor(REQUESTS_IN_FLIGHT) as threads:
            return list(threads.map(self._score, requests))

    def log_probabilities(self, request: ScoreRequest) -> None:
        """A server shows those of some tokens only."""

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, is_done: IsDone = never
    ) -> list[list[int]]:
        def continue_one(prompt: Sequence[int]) -> list[int]:
            choice = self._complete(list(prompt), max_tokens=new_tokens, return_token_ids=True)
            ended = choice["finish_reason"] == "stop"
            tokens = list(choice["token_ids"])
            if not ended and len(tokens) < new_tokens:
                raise UserError(
                    f"The server at {self._url} cuts answers after {len(tokens)} tokens, of "
                    f"{new_tokens} asked for; serve the model without max_new_tokens in its "
                    "generation_config.json."
                )
            return tokens[:-1] if ended else tokens

        with ThreadPoolExecutor(REQUESTS_IN_FLIGHT) as threads:
            return list(threads.map(continue_one, prompts))

    def close(self) -> None:
        self._client.close()

    def _score(self, request: ScoreRequest) -> Score:
        tokens = [*request.context, *request.continuation]
        choice = self._complete(tokens, max_tokens=1, prompt_logprobs=0)
        entries = choice.get("prompt_logprobs")
        if not entries or len(entries) != len(tokens):
            raise UserError(
                f"The server at {self._url} returned no prompt_logprobs; it has to be vLLM's."
            )
        first = len(request.context)
        found = [
            entry[str(token)]
            for entry, token in zip(entries[first:], request.continuation, strict=True)
        ]
        return score_of_logprobs([(entry["logprob"], entry["rank"]) for entry in found])

    def _complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, **GREEDY, **options}
        try:
            response = self._client.post("/v1/completions", json=body).raise_for_status()
            choice: dict[str, Any] = response.json()["choices"][0]
            return choice
        except httpx.HTTPStatusError as error:
            text = error.response.text[:200]
            raise UserError(
                f"The server at {self._url} answered {error.response.status_code}: {text}"
            ) from None
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise UserError(
                f"The server at {self._url} failed in the middle of the evaluation ({error!r})."
            ) from None
