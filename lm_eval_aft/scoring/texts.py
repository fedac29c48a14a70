"""Generation requests: which may be decoded the fast way, and what text their tokens make."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lm_eval_aft.packability import disagreement, refused
from lm_eval_aft.positions import row_roles
from lm_eval_aft.private_names import borrowed
from lm_eval_aft.scoring.generation import Ending, Watch, continuations, prompt, unusual
from lm_eval_aft.scoring.loglikelihood import Scorer
from lm_eval_aft.scoring.naive import Naive
from lm_eval_aft.scoring.requests import Question
from lm_eval_aft.scoring.steps import Step

with borrowed(
    "lm-eval: lm_eval.models.utils (handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text)"
):
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

logger = logging.getLogger(__name__)

Stock = Callable[[list[Instance]], list[str]]


@dataclass(frozen=True)
class Settings:
    """What a request's gen_kwargs come to: stop strings (end of text included), most new tokens."""

    until: tuple[str, ...]
    most: int


class Texts:
    """Answers generation requests by greedy decoding in shared batches.

    On first use, and again for prompts longer than any before, the shortest and the longest prompt are
    decoded by ``stock`` too, and their logits compared with a plain pass; if they differ, everything is
    left to stock, and the log says so.
    Texts are those of stock at batch size 1. In 16 bits stock's own texts depend on the batch
    size, so nothing is promised and stock answers.

    Args:
        naive: what the logits are compared with, rather than the texts with stock's, where some positions
            only are steered.
    """

    def __init__(self, lm: HFLM, scorer: Scorer, stock: Stock, naive: Naive | None = None) -> None:
        self.lm = lm
        self.scorer = scorer
        self.stock = stock
        self.naive = naive
        self.taken: Counter[str] = Counter()
        self._holds: bool | None = None
        self._longest = 0

    def answers(self, requests: Sequence[Instance], states: Sequence[int] = ()) -> Iterator[tuple[int, str]]:
        """(Index, text) of the requests that the fast way can answer, in any order.

        Only for models without a `refusal`. ``states`` says, request by request, which of the
        scorer's ``rows`` steers it.
        """
        groups: dict[Settings, list[Question]] = {}
        for index, request in enumerate(requests):
            context, kwargs = request.args
            settings = self._settings(kwargs)
            if settings is None:
                continue
            question = self._prompt(index, context, settings, states[index] if states else 0)
            if question is not None:
                groups.setdefault(settings, []).append(question)
        shared = 0
        with self.scorer.prepared():
            for settings, questions in groups.items():
                longest = max(question.length for question in questions) + settings.most
                if self._holds is None or (self._holds and longest > self._longest):
                    self._holds = self._check(questions, settings, requests)
                    self._longest = longest
                if self._holds:
                    shared += len(questions)
                    yield from self._decode(questions, settings)
        self.taken += Counter({"generated in shared batches": shared, "stock": len(requests) - shared})

    def refusal(self) -> str:
        """Why this model's texts are all left to stock; an empty string when they are not."""
        lm = self.lm
        if self.scorer.dtype not in (torch.float32, torch.float64):
            return "16 bits"
        if lm.truncation or lm.think_end_token is not None:
            return "truncation or thinking"
        return unusual(lm.model.generation_config)

    def _settings(self, gen_kwargs: Any) -> Settings | None:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.lm.max_gen_toks))
        eos = self.lm.tok_decode(self.lm.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        most = kwargs.pop("max_gen_toks")
        greedy = not kwargs.pop("do_sample", False) and not kwargs.pop("temperature", 0)
        if kwargs or not greedy or not 0 < most < self.lm.max_length:
            return None
        return Settings(tuple(until), most)

    def _prompt(self, index: int, context: str, settings: Settings, state: int) -> Question | None:
        ids, _ = self.lm.tok_batch_encode([context], left_truncate_len=self.lm.max_length - settings.most)
        tokens = ids[0].tolist()
        if not tokens or refused(self.lm.model, len(tokens) + settings.most):
            return None
        return prompt(index, tokens, state)

    def _check(self, questions: list[Question], settings: Settings, requests: Sequence[Instance]) -> bool:
        ordered = sorted(questions, key=lambda question: question.length)
        probe = ordered[:1] + ordered[1:][-1:]
        reason = self.scorer.unless_reordered(partial(self._differs, probe, settings, requests))
        if reason:
            logger.warning("Generation is left to stock: %s.", reason)
        return not reason

    def _differs(self, probe: Sequence[Question], settings: Settings, requests: Sequence[Instance]) -> str:
        """Why texts are not to be made the fast way; ``""`` where it gives stock's."""
        seen: dict[int, list[Tensor]] = {}
        try:
            fast = dict(
                self._decode(probe, settings, lambda i, logits: seen.setdefault(i, []).append(logits))
            )
            reasons = [self._logits_differ(question, seen[question.options[0].index]) for question in probe]
        except Exception as error:  # whatever a model's own code makes of such passes
            return f"the model refuses ({type(error).__name__}: {str(error)[:200]})"
        if any(reasons) or self.naive is not None:
            return "; ".join(filter(None, reasons))
        indices = sorted(fast)
        same = self.stock([requests[i] for i in indices]) == [fast[i] for i in indices]
        return "" if same else "its texts differ"

    def _logits_differ(self, question: Question, seen: list[Tensor]) -> str:
        """Compare the logits behind each token with one plain pass; texts alone would show little."""
        fast = torch.stack(seen)
        tokens = fast.argmax(-1)
        if self.naive is not None:
            prompt = [*question.context, *question.tokens]
            return self.naive.logits_differ(prompt, tokens.tolist(), fast, question.state)
        ids = torch.tensor(
            [[*question.context, *question.tokens, *tokens.tolist()[:-1]]], device=tokens.device
        )
        places = list(range(len(question.context), ids.shape[1]))
        roles = torch.tensor([row_roles(len(question.context) + 1, len(tokens) - 1)], device=ids.device)
        step = Step({"input_ids": ids}, scored=places, states=[question.state], roles=roles)
        with self.scorer.prepared(fast=False):
            slow = self.scorer.logits(step, None)
        assert slow is not None
        values = [
            logits.float().log_softmax(-1).gather(-1, tokens[:, None].to(logits.device))[:, 0]
            for logits in (fast, slow)
        ]
        return disagreement(values[0], values[1], torch.ones_like(tokens), self.scorer.dtype)

    def _decode(
        self, questions: Sequence[Question], settings: Settings, watch: Watch | None = None
    ) -> Iterator[tuple[int, str]]:
        tokenizer = self.lm.tokenizer
        # As far back as stock looks, for a stop string in other tokens than its own.
        back = 2 + max(len(tokenizer.encode(stop, add_special_tokens=False)) for stop in settings.until)

        @lru_cache(maxsize=1 << 16)  # small models repeat themselves, and decoding takes longer than looking
        def holds_stop(tokens: tuple[int, ...]) -> bool:
            text = tokenizer.decode(tokens)
            return any(stop in text for stop in settings.until)

        def stops(tokens: list[int]) -> bool:
            return holds_stop(tuple(tokens[-back:]))

        eos = self.lm.model.generation_config.eos_token_id
        ends = frozenset(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])
        ending = Ending(settings.most, ends, stops)
        for index, tokens in continuations(self.scorer, questions, ending, watch):
            text = postprocess_generated_text(
                generation=self.lm.tok_decode(tokens), stop=list(settings.until), think_end_token=None
            )
            yield index, text
