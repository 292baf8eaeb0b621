"""Any backend as a model of lm-evaluation-harness (EleutherAI), which brings prompts, targets and
metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gradmap.common.errors import UserError
from gradmap.evaluation.backends import IsDone, Question, ScoreRequest
from gradmap.evaluation.scoring import Scorer

DEFAULT_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """Encodes texts as the harness's own transformers model does; every score comes from the
    scorer.

    description: of what is being evaluated, for the progress bar.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any, description: str) -> None:
        super().__init__()
        self._scorer = scorer
        self._description = description
        self.tokenizer = tokenizer

    @property
    def tokenizer_name(self) -> str:
        """The harness names its caches by it, which are not used."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the tokenizer's chat template writes it. As in the harness, where a
        template takes no system message, that is left out."""
        try:
            return self._as_chat(chat_history, add_generation_prompt)
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            return self._as_chat(others, add_generation_prompt)

    def _as_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    @property
    def eot_token_id(self) -> int:
        return self._special_token(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token id that stands before a text without context: BOS, or the EOS of another
        text."""
        bos = self.tokenizer.bos_token_id
        return self._special_token(self.tokenizer.eos_token_id if bos is None else bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos is not None and string.startswith(bos):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, verbose=False, **options)
        return ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        fitting = [self._truncated(context, continuation) for _, context, continuation in requests]
        scores = self._scorer.score(fitting, self._description)
        return [
            (score.log_likelihood, score.greedy_tokens == len(request.continuation))
            for request, score in zip(fitting, scores, strict=True)
        ]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Whole texts, in windows of the longest sequence the model takes, each token predicted
        once."""
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._scorer.score(list(chain.from_iterable(windows)), self._description))
        totals = []
        for text in windows:
            of_text = islice(scores, len(text))
            totals.append(sum(score.log_likelihood for score in of_text))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        questions = [self._question(*request.args) for request in requests]
        answers = self._scorer.answer(questions, self._description, self._is_done)
        return [
            _until(self._text_of(answer), question.stops)
            for question, answer in zip(questions, answers, strict=True)
        ]

    def _question(self, prompt: str, options: Mapping[str, Any]) -> Question:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise UserError(
                f"{self._description} samples its answers; only greedy tasks are supported."
            )
        settings = normalize_gen_kwargs(dict(options), DEFAULT_NEW_TOKENS)
        new_tokens, max_tokens = settings["max_gen_toks"], self._scorer.backend.max_tokens
        if new_tokens >= max_tokens:
            raise UserError(
                f"Answers of {self._description} have up to {new_tokens} tokens, and the model "
                f"takes {max_tokens}, with the question; leave this task out."
            )
        ids = self.tok_encode(prompt)[-(max_tokens - new_tokens) :]
        stops = tuple(stop for stop in settings["until"] if stop)
        return Question(tuple(ids), new_tokens, stops)

    def _is_done(self, question: Question) -> IsDone:
        def is_done(answer: Sequence[int]) -> bool:
            text = self._text_of(answer)
            return any(stop in text for stop in question.stops)

        return is_done

    def _text_of(self, answer: Sequence[int]) -> str:
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def _truncated(self, context: Sequence[int], continuation: Sequence[int]) -> ScoreRequest:
        """Cuts the context on the left, so that all but the last token fit."""
        if not continuation:
            raise UserError(
                f"{self._description} has an answer without a token of its own; it cannot be "
                "scored."
            )
        room = self._scorer.backend.max_tokens + 1 - len(continuation)
        return ScoreRequest(tuple(context[-max(1, room) :]), tuple(continuation))

    def _windows(self, text: str) -> list[ScoreRequest]:
        windows = get_rolling_token_windows(
            self.tok_encode(text),
            self.prefix_token_id,
            max_seq_len=self._scorer.backend.max_tokens,
            context_len=1,
        )
        return [
            ScoreRequest(tuple(context), tuple(tokens))
            for context, tokens in map(make_disjoint_window, windows)
        ]

    @staticmethod
    def _special_token(token: int | None) -> int:
        if token is None:
            raise UserError(
                "The tokenizer has neither a BOS nor an EOS token, and this task has texts "
                "without context; add the model's own special tokens to tokenizer_config.json."
            )
        return token


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text
