"""Stock `hf` scoring and generation of a steered model: batch sizes, and which tokens are steered."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_aft.engine.active_steering import ActiveSteering
from lm_eval_aft.engine.checks import Naive, watched, wrong
from lm_eval_aft.engine.rows import Answer, Request, shortest_and_longest
from lm_eval_aft.steering.intervention import roles, row_roles

logger = logging.getLogger(__name__)
T = TypeVar("T")
# What one batch may take, in bytes.
STOCK_BATCH_BYTES = 2 << 30


class StockLM(HFLM):
    """lm-eval's `hf` model, steered, whose own code can also be given part of an evaluation's requests.

    Attributes:
        active: what steers the model.
        fast: whether optimised paths are on, so that stock code gets only what these leave over.
        texts_not_finite: how many passes of generation gave NaN or infinite logits under this steering.
        naive: where only some positions are steered: the reference that answers are checked against.
    """

    batch_schedule: float  # these three are `HFLM`'s
    batch_size_per_gpu: int
    batch_sizes: dict[int, int]
    active: ActiveSteering = None  # type: ignore[assignment]  # until the model is loaded
    fast: bool = True
    texts_not_finite: int = 0
    naive: Naive | None = None
    _computes_batch_size: bool = False
    _kinds: frozenset[tuple[str, str]] = frozenset()  # of vectors, for which `_faults` were looked for
    _faults: dict[tuple[str, int], str]

    def forget_checks(self) -> bool:
        """Call after steering has changed; True if answers must be checked again.

        They must where vectors of another method or other positions now steer only some of the tokens.
        """
        kinds = self.active.kinds if self.active.masked else frozenset()
        if kinds == self._kinds:
            return False
        self._kinds, self._faults, self.naive = kinds, {}, None
        if kinds:
            self.naive = Naive(
                self.model,
                self.active.backbone,
                self.active.vector_in,
                device=self.device,
                window=self.max_length,
                softmax_dtype=self.softmax_dtype,
                autocast=self.mixed_precision_dtype,
                rows=self.active.rows,
            )
        return True

    def stock_answers(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        """Stock's answers to requests that one vector steers, or none.

        Where only some positions are steered, one request at a time: stock pads and truncates batches itself,
        so which tokens are context would not be known.
        """
        ask = super()._loglikelihood_tokens
        if not self.active.masked:
            return list(ask(list(requests), disable_tqdm, override_bs))
        found: list[Answer] = []
        for request in requests:
            _, context, tail = request
            kept = min(len(context) + len(tail), self.max_length + 1)
            row = row_roles(max(0, kept - len(tail)), min(kept, len(tail)) - 1)
            with roles(torch.tensor([row])):
                found += ask([request], True, 1)

        def differs(naive: Naive, state: int) -> str:
            fits = [
                i for i, (_, head, tail) in enumerate(requests) if head and tail and naive.fits(head, tail)
            ]
            probe = shortest_and_longest(fits, lambda i: len(requests[i][1]) + len(requests[i][2]))
            return naive.differs(
                [requests[i] for i in probe], [found[i] for i in probe], [state] * len(probe)
            )

        self._check("scoring", differs)
        return found

    def rounding(self, requests: Sequence[Request], answers: Sequence[Answer]) -> float:
        """How far stock's ``answers`` to these requests move (nats) in one batch with a longer request.

        The padding changes only the order of sums, so this is what the dtype gives on this model.
        """
        _, context, tail = max(requests, key=lambda request: len(request[1]) + len(request[2]))
        room = self.max_length + 1 - len(context) - len(tail)
        longer = (None, [*context, *context[:8]][: len(context) + max(0, room)], tail)
        before, self.batch_size_per_gpu = self.batch_size_per_gpu, len(requests) + 1
        try:
            again = self.some_stock_answers([*requests, longer])
        finally:
            self.batch_size_per_gpu = before
        moved = [abs(a - b) for (a, _), (b, _) in zip(answers, again, strict=False)]
        return max(moved) if all(map(math.isfinite, moved)) else 0.0

    def some_stock_answers(self, requests: Sequence[Request], states: Sequence[int] = ()) -> list[Answer]:
        """Stock's answers to part of the requests; ``states``: which of a router's vectors steers each."""
        rows = self.active.rows
        ask = self._asked_for_some()(self.stock_answers)
        return ask(requests) if rows is None else rows.apart(states, requests, ask)

    def stock_texts(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Stock's texts; under a router vector by vector."""

        def ask(mine: list[Instance]) -> list[str]:
            def differs(naive: Naive, state: int) -> str:
                texts = shortest_and_longest({request.args[0] for request in mine}, len)
                prompts = [self.tok_batch_encode([text])[0][0].tolist() for text in texts]
                return naive.generation_differs(prompts, state, int(self.tokenizer.pad_token_id or 0))

            if mine:
                self._check("generation", differs)
            with watched(self.model) as odd:
                found = list(HFLM.generate_until(self, mine, disable_tqdm=disable_tqdm))
            self.texts_not_finite += odd()
            return found

        return self.by_vector(requests, ask)

    def some_stock_texts(self, requests: list[Instance]) -> list[str]:
        """Stock's texts for part of the requests."""
        with self._asked_for_some():
            return self.stock_texts(requests)

    def by_vector(self, requests: list[Instance], ask: Callable[[list[Instance]], list[T]]) -> list[T]:
        """What stock code answers; under a router one vector at a time, since stock makes its own batches."""
        routing, rows = self.active.routing, self.active.rows
        if routing is None or rows is None:
            return ask(requests)
        return rows.apart(routing.states(requests), requests, self._asked_for_some()(ask))

    def kept_answers_differ(self, requests: Sequence[Instance], found: Sequence[Answer | None]) -> bool:
        """Whether answers found while the baseline was scored are wrong for the vector in force."""
        naive = self.naive
        if naive is None:
            return False
        at = [i for i, answer in enumerate(found) if answer is not None and all(requests[i].args)]
        at = shortest_and_longest(at, lambda i: len("".join(requests[i].args)))
        probe = [((None, *self._encode_pair(*requests[i].args)), found[i] or (0.0, False)) for i in at]
        probe = [(request, answer) for request, answer in probe if naive.fits(*request[1:])]
        reason = naive.differs([request for request, _ in probe], [a for _, a in probe], [0] * len(probe))
        if reason:
            logger.warning("The vector is scored by itself: along with the baseline its %s.", reason)
        return bool(reason)

    def _check(self, what: str, differs: Callable[[Naive, int], str]) -> None:
        """Raise `AFTError` where `hf`'s own code does not steer the positions asked for; checked once."""
        state = self.active.state
        vector = self.active.vector_in(state)
        if self.naive is None or vector is None or vector.positions == "all":
            return
        if (what, state) not in self._faults:
            self._faults[what, state] = differs(self.naive, state)
        reason = self._faults[what, state]
        if reason:
            raise wrong(f"Stock {what}", vector.positions, reason)

    @contextmanager
    def _asked_for_some(self) -> Iterator[None]:
        """Inside the block `HFLM` does not search for a batch size.

        The search needs all processes, and it splits the requests into the N parts of ``auto:N``, more
        than there may be requests.
        """
        before = self._computes_batch_size, self.batch_schedule, self.batch_sizes
        self._computes_batch_size, self.batch_schedule, self.batch_sizes = True, 1, {}
        try:
            yield
        finally:
            self._computes_batch_size, self.batch_schedule, self.batch_sizes = before

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """Computed, where `HFLM` tries sizes until memory runs out: on a CPU the whole machine would."""
        if not self._computes_batch_size and not (self.fast and self.device.type == "cpu"):
            return int(super()._detect_batch_size(requests, pos))
        length = self.max_length
        if requests:
            length = min(length, len(requests[pos][1]) + len(requests[pos][2]))
        return stock_rows(self.model, length, int(self.max_batch_size))


def stock_rows(model: Any, length: int, most: int) -> int:
    """Rows of ``length`` tokens whose logits fit, at least 1 and no more than ``most``."""
    row = 4 * length * model.config.get_text_config().vocab_size
    # Logits, their log-softmax, and as much again for everything else.
    return max(1, min(most, STOCK_BATCH_BYTES // (4 * int(row))))
