"""Which way requests are scored: the fastest that agrees with stock `hf`, tried on first use."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lm_eval_aft.engine.compatibility import disagreement, refused, row_decides
from lm_eval_aft.engine.naive import Naive
from lm_eval_aft.engine.requests import Answer, Question, Request, gather, with_common_prefixes
from lm_eval_aft.engine.scorer import Answers, Scorer, Shifts
from lm_eval_aft.steering.hooks import add_all
from lm_eval_aft.steering.intervention import roles, row_roles

logger = logging.getLogger(__name__)
StockScoring = Callable[[Sequence[Request]], list[Answer]]
# From the fastest to the plainest. "prefixed": packed, behind a prefix that many questions share and
# that is read once. "packed": a question's context is read once. "trimmed": stock's rows, the
# vocabulary head on scored positions only.
FALLBACK = {"prefixed": "packed", "packed": "trimmed", "trimmed": "stock"}


class Paths:
    """Scores requests by the fastest path each may take, and counts the paths taken.

    On first use, and again on questions longer than any before, a path is compared with stock on the
    longest and the shortest question at hand. If it differs, or fails, it is tried without reordered
    weights, then the next one is, and the log says why.

    Args:
        stock: answers requests as `HFLM` does, for the model as it stands.
        window: most tokens a row may have; longer requests are cut by stock, and left to it.
        naive: what paths are compared with instead of stock, where some positions only are steered.
    """

    def __init__(self, scorer: Scorer, stock: StockScoring, window: int, naive: Naive | None = None) -> None:
        self.scorer = scorer
        self.stock = stock
        self.window = window
        self.naive = naive
        self.taken: Counter[str] = Counter()
        self._holds: dict[str, bool] = {}
        self._longest: dict[str, int] = {}
        self._states: Sequence[int] = ()

    def score(
        self,
        requests: Sequence[Request],
        report: Callable[[list[Answers]], None],
        vectors: Sequence[Shifts] = (),
        states: Sequence[int] = (),
    ) -> None:
        """Hand answers by request index to ``report``, part by part: the model's, then each vector's.

        What stock must answer comes without the vectors' answers: a shorter list. ``states`` says,
        request by request, which of the scorer's ``rows`` steers it.
        """
        self.scorer.vectors = list(vectors)
        self._states = states
        try:
            with self.scorer.prepared():
                self._score(gather(enumerate(requests), states), requests, report)
        finally:
            self.scorer.vectors = []

    def _score(
        self,
        every: Iterable[Question],
        requests: Sequence[Request],
        report: Callable[[list[Answers]], None],
    ) -> None:
        fitting: list[Question] = []
        too_long: list[Question] = []
        empty: list[Question] = []  # an option without tokens: stock refuses it in its own words
        for question in every:
            whole = all(option.targets for option in question.options)
            fits = question.longest <= self.window + 1
            (too_long if not fits else fitting if whole else empty).append(question)
        if too_long:
            logger.info(
                "%d documents are longer than %d tokens: stock cuts and scores them.",
                len(too_long),
                self.window,
            )
        left = too_long + empty
        plain: list[Question] = []
        for prefix, questions in with_common_prefixes(fitting):
            shared = [q for q in questions if self._may_share(q) and (prefix or q.rows > 1)]
            path = "prefixed" if prefix else "packed"
            while shared and path != "trimmed" and not self._check(path, shared, prefix, requests):
                path, prefix = FALLBACK[path], 0
            if path == "trimmed":
                shared = []
            taken = {id(question) for question in shared}
            plain += [question for question in questions if id(question) not in taken]
            self._answer(path, shared, prefix, requests, report)
        longest = max((question.longest for question in plain), default=0)
        told_by_row = row_decides(self.scorer.model, longest)
        if plain and not told_by_row and self._check("trimmed", plain, 0, requests):
            self._answer("trimmed", plain, 0, requests, report)
        else:
            left += plain
        if left:
            self.taken["stock"] += len(left)
            items = _items(left, requests)
            answers = self._by_stock(items)
            report([{i: answer for (i, _), answer in zip(items, answers, strict=True)}])

    def _answer(
        self,
        path: str,
        questions: Sequence[Question],
        prefix: int,
        requests: Sequence[Request],
        report: Callable[[list[Answers]], None],
    ) -> None:
        if questions:
            self._drop_vectors_unless_resumable(path, questions, prefix, requests)
            for part in self._parts(path, questions, prefix, requests):
                report(part)
            self.taken[path] += len(questions)

    def _by_stock(self, items: Sequence[tuple[int, Request]]) -> list[Answer]:
        asked, rows = [request for _, request in items], self.scorer.rows
        if rows is None:
            return self.stock(asked)
        return rows.apart([self._states[i] for i, _ in items], asked, self.stock)

    def _may_share(self, question: Question) -> bool:
        return not refused(self.scorer.model, question.length)

    def _parts(
        self, path: str, questions: Sequence[Question], prefix: int, requests: Sequence[Request]
    ) -> Iterator[list[Answers]]:
        if path == "trimmed":
            return self.scorer.plain(_items(questions, requests), self._states)
        return self.scorer.packed(questions, prefix if path == "prefixed" else 0)

    def _check(
        self, path: str, questions: Sequence[Question], prefix: int, requests: Sequence[Request]
    ) -> bool:
        longest = max(question.longest for question in questions)
        if path not in self._holds or (self._holds[path] and longest > self._longest[path]):
            probe = _probe(questions)
            reason = self.scorer.unless_reordered(partial(self._differs, path, probe, prefix, requests))
            self._holds[path], self._longest[path] = not reason, longest
            if reason:
                logger.warning("Scoring goes from %s to %s: %s.", path, FALLBACK[path], reason)
        return self._holds[path]

    def _differs(self, path: str, probe: Sequence[Question], prefix: int, requests: Sequence[Request]) -> str:
        vectors, self.scorer.vectors = self.scorer.vectors, []
        try:
            fast = {i: a for part in self._parts(path, probe, prefix, requests) for i, a in part[0].items()}
        except Exception as error:  # whatever a model's own code makes of such a pass
            return f"the model refuses it ({type(error).__name__}: {str(error)[:200]})"
        finally:
            self.scorer.vectors = vectors
        if self.naive is not None:
            states = [self._states[i] if self._states else 0 for i in sorted(fast)]
            return self.naive.differs(
                [requests[i] for i in sorted(fast)], [fast[i] for i in sorted(fast)], states
            )
        slow = self._by_stock([(i, (None, *request[1:])) for i, request in _items(probe, requests)])
        return self._compare(fast, dict(zip(sorted(fast), slow, strict=True)), requests)

    def _compare(self, fast: Answers, slow: Answers, requests: Sequence[Request]) -> str:
        indices = sorted(fast)
        dtype = self.scorer.dtype
        reason = disagreement(
            torch.tensor([fast[i][0] for i in indices], dtype=torch.float64),
            torch.tensor([slow[i][0] for i in indices], dtype=torch.float64),
            torch.tensor([len(requests[i][2]) for i in indices]),
            dtype,
        )
        if reason:
            return f"log-likelihoods {reason}"
        if dtype == torch.float32 and any(fast[i][1] != slow[i][1] for i in indices):
            return "greedy decoding differs"
        return ""

    def _drop_vectors_unless_resumable(
        self, path: str, questions: Sequence[Question], prefix: int, requests: Sequence[Request]
    ) -> None:
        """Keep the scorer's vectors only if resuming from a vector's layer equals passes under it."""
        scorer = self.scorer
        shifts = next((shifts for shifts in scorer.vectors if shifts), None)
        if shifts is not None and "resumed" not in self._holds:
            probe, vectors = _probe(questions), scorer.vectors
            reason = ""
            try:
                scorer.vectors = [shifts]
                parts = list(self._parts(path, probe, prefix, requests))
                fast = {i: a for part in parts for i, a in part[1].items()}
                scorer.vectors = []
                with add_all(scorer.backbone, shifts):
                    parts = list(self._parts(path, probe, prefix, requests))
                reason = self._compare(fast, {i: a for part in parts for i, a in part[0].items()}, requests)
            except Exception as error:  # whatever a model's own code makes of such a pass
                reason = f"the model refuses it ({type(error).__name__}: {str(error)[:200]})"
            finally:
                scorer.vectors = vectors
            self._holds["resumed"] = not reason
            if reason:
                logger.warning("Each vector is scored by itself: passes cannot start midway: %s.", reason)
        if not self._holds.get("resumed", True):
            scorer.vectors = []


def _items(questions: Sequence[Question], requests: Sequence[Request]) -> list[tuple[int, Request]]:
    """The questions' requests with their indices, in order."""
    indices = sorted(option.index for question in questions for option in question.options)
    return [(i, requests[i]) for i in indices]


def _probe(questions: Sequence[Question]) -> list[Question]:
    """The longest and the shortest question."""
    longest = max(questions, key=lambda question: question.longest)
    shortest = min(questions, key=lambda question: question.longest)
    return [longest] if longest is shortest else [longest, shortest]


# Asking stock code: how many rows at once, and one by one where its rows must be known.

# What one batch may take, in bytes.
STOCK_BATCH_BYTES = 2 << 30


def stock_rows(model: Any, length: int, most: int) -> int:
    """Rows of ``length`` tokens whose logits fit, at least 1 and no more than ``most``."""
    row = 4 * length * model.config.get_text_config().vocab_size
    # Logits, their log-softmax, and as much again for everything else.
    return max(1, min(most, STOCK_BATCH_BYTES // (4 * int(row))))


def one_by_one(
    requests: Sequence[Request], window: int, ask: Callable[[Request], Sequence[Answer]]
) -> list[Answer]:
    """Answers where it must be known which tokens are the context's: stock pads and cuts on its own.

    Args:
        window: most tokens stock leaves in a row, cutting on the left.
        ask: stock's answer to one request.
    """
    found: list[Answer] = []
    for request in requests:
        _, context, continuation = request
        kept = min(len(context) + len(continuation), window + 1)
        row = row_roles(max(0, kept - len(continuation)), min(kept, len(continuation)) - 1)
        with roles(torch.tensor([row])):
            found += ask(request)
    return found


class StockLM(HFLM):
    """lm-eval's `hf` model that can be asked for some of an evaluation's requests.

    Attributes:
        fast: whether there is another way, so that stock answers only what is left over.
    """

    batch_schedule: float  # these two are `HFLM`'s
    batch_sizes: dict[int, int]
    fast: bool = True
    _reckons: bool = False

    def _alone(self, stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``stock`` for some of the requests: without `HFLM`'s search for a batch size.

        All processes must take part in that, and it divides the requests into as many parts as
        ``auto:N`` says, of which there may be fewer.
        """

        def ask(requests: Any) -> Any:
            before = self.batch_schedule, self.batch_sizes
            self._reckons, self.batch_schedule, self.batch_sizes = True, 1, {}
            try:
                return stock(requests)
            finally:
                self._reckons = False
                self.batch_schedule, self.batch_sizes = before

        return ask

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """On a CPU nothing runs out of memory until the machine does: reckon, where `HFLM` tries."""
        if not self._reckons and not (self.fast and self.device.type == "cpu"):
            return int(super()._detect_batch_size(requests, pos))
        length = self.max_length
        if requests:
            length = min(length, len(requests[pos][1]) + len(requests[pos][2]))
        return stock_rows(self.model, length, int(self.max_batch_size))
