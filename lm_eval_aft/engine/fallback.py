"""Which way requests are scored: the fastest that agrees with stock `hf`, tried on first use."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from lm_eval_aft.engine.checks import answers_differ, less_precise, packing_ruled_out, row_decides
from lm_eval_aft.engine.precision import computed_in_float32
from lm_eval_aft.engine.rows import (
    Answer,
    PackedRow,
    Request,
    gather,
    shortest_and_longest,
    with_common_prefixes,
)
from lm_eval_aft.engine.scorer import Answers, Scorer, Shifts
from lm_eval_aft.engine.stock import StockLM
from lm_eval_aft.steering.hooks import add_all, layer_shifts
from lm_eval_aft.steering.vector import SteeringVector

logger = logging.getLogger(__name__)
# From the fastest to the plainest. "prefixed": packed, behind a prefix that many rows share and
# that is read once. "packed": a row's context is read once. "trimmed": stock's rows, the
# vocabulary head on scored positions only.
FALLBACK = {"prefixed": "packed", "packed": "trimmed", "trimmed": "stock"}


# In fp32 answers may be so many times as far from stock's as these move with stock's own batch size.
ROUNDINGS = 4
# Rows that 16-bit answers are compared with float32's on.
ERROR_ROWS = 16


class ScoringPaths:
    """Scores requests by the fastest path each may take, and counts the paths taken.

    On first use, and again on rows longer than any before, a path is compared with stock (or, where only some
    positions are steered, with `Naive`) on the shortest and the longest row. If it differs
    or fails, it is tried without reordered weights, then the next path is tried, and the log says why.
    Requests longer than the window are left to stock, which truncates them.
    """

    def __init__(self, lm: StockLM, scorer: Scorer) -> None:
        self.lm = lm
        self.scorer = scorer
        self.taken: Counter[str] = Counter()
        self._requests: Sequence[Request] = ()
        self._states: Sequence[int] = ()

    def score(
        self, requests: Sequence[Request], vectors: Sequence[Shifts] = (), states: Sequence[int] = ()
    ) -> Iterator[list[Answers]]:
        """Answers by request index, part by part: the model's, then each vector's.

        What stock must answer comes without the vectors' answers: a shorter list. ``states`` says,
        request by request, which of the scorer's ``rows`` steers it.
        """
        self._requests, self._states = requests, states
        with self.scorer.along(vectors), self.scorer.prepared():
            yield from self._score(gather(enumerate(requests), states))

    def _score(self, every: Iterable[PackedRow]) -> Iterator[list[Answers]]:
        window = self.lm.max_length
        fitting: list[PackedRow] = []
        left: list[PackedRow] = []
        for row in every:
            # Stock has its own error for an option without tokens.
            fits = row.longest <= window + 1 and all(option.targets for option in row.options)
            (fitting if fits else left).append(row)
        too_long = sum(row.longest > window + 1 for row in left)
        if too_long:
            logger.info(
                "%d documents are longer than %d tokens: stock cuts and scores them.", too_long, window
            )
        plain: list[PackedRow] = []
        for prefix, rows in with_common_prefixes(fitting):
            shared = [
                row
                for row in rows
                if (prefix or row.unshared > 1) and not packing_ruled_out(self.scorer.model, row.width)
            ]
            path = "prefixed" if prefix else "packed"
            while shared and path != "trimmed" and not self._holds(path, shared, prefix):
                path, prefix = FALLBACK[path], 0
            if path == "trimmed":
                shared = []
            taken = {id(row) for row in shared}
            plain += [row for row in rows if id(row) not in taken]
            yield from self._answer(path, shared, prefix)
        told_by_row = row_decides(self.scorer.model, max((row.longest for row in plain), default=0))
        if plain and not told_by_row and self._holds("trimmed", plain):
            yield from self._answer("trimmed", plain)
        else:
            left += plain
        if left:
            self.taken["stock"] += len(left)
            items = self._items(left)
            yield [dict(zip([i for i, _ in items], self._stock_answers(items), strict=True))]

    def _answer(self, path: str, rows: Sequence[PackedRow], prefix: int = 0) -> Iterator[list[Answers]]:
        if rows:
            if not self._may_resume(path, rows, prefix):
                self.scorer.vectors = []
            yield from self._parts(path, rows, prefix)
            self.taken[path] += len(rows)

    def _parts(self, path: str, rows: Sequence[PackedRow], prefix: int) -> Iterator[list[Answers]]:
        if path == "trimmed":
            return self.scorer.plain(rows)
        return self.scorer.packed(rows, prefix)

    def _probed(
        self, path: str, probe: Sequence[PackedRow], prefix: int, vectors: Sequence[Shifts] = ()
    ) -> list[Answer]:
        """Answers to the probe's requests, in order: of the last of ``vectors``, or of the model as it is."""
        with self.scorer.along(vectors):
            found = {i: a for part in self._parts(path, probe, prefix) for i, a in part[-1].items()}
        return [found[i] for i in sorted(found)]

    def _holds(self, path: str, rows: Sequence[PackedRow], prefix: int = 0) -> bool:
        probe = shortest_and_longest(rows, lambda row: row.longest)
        return self.scorer.holds(
            path,
            max(row.longest for row in rows),
            partial(self._probed, path, probe, prefix),
            partial(self._differs, path, rows, prefix, self._items(probe)),
            f"Scoring goes from {path} to {FALLBACK[path]}",
        )

    def _differs(
        self,
        path: str,
        rows: Sequence[PackedRow],
        prefix: int,
        items: Sequence[tuple[int, Request]],
        fast: Sequence[Answer],
    ) -> str:
        asked = [request for _, request in items]
        if self.lm.naive is not None:
            return self.lm.naive.differs(
                asked, fast, [self._states[i] if self._states else 0 for i, _ in items]
            )
        slow = self._stock_answers([(i, (None, *request[1:])) for i, request in items])
        tokens = [len(tail) for _, _, tail in asked]
        reason = answers_differ(fast, slow, tokens, self.scorer.dtype)
        if reason and self.scorer.dtype == torch.float32 and not self._states:
            moved = self.lm.rounding([(None, *request[1:]) for request in asked], slow)
            reason = answers_differ(fast, slow, tokens, self.scorer.dtype, ROUNDINGS * moved)
            if not reason:
                logger.info(
                    "In fp32 stock's own answers move by %.1g nats with its batch size; ours may differ by "
                    "%d times as much.",
                    *(moved, ROUNDINGS),
                )
        if reason and self.scorer.halves and not self._states:
            reason = self._less_precise(path, rows, prefix)
        return reason

    def _less_precise(self, path: str, rows: Sequence[PackedRow], prefix: int) -> str:
        """`less_precise` on rows of all lengths."""
        ordered = sorted(rows, key=lambda row: row.longest)
        probe = [ordered[i] for i in sorted({*np.linspace(0, len(rows) - 1, ERROR_ROWS).round().astype(int)})]
        asked = [(i, (None, *request[1:])) for i, request in self._items(probe)]
        found = [self._probed(path, probe, prefix), self._stock_answers(asked)]
        with computed_in_float32(self.scorer.model):
            found.append(self._stock_answers(asked))
        return less_precise(*([value for value, _ in each] for each in found))

    def _may_resume(self, path: str, rows: Sequence[PackedRow], prefix: int) -> bool:
        """Whether passes resumed from a vector's layer equal whole passes under that vector."""
        shifts = next((shifts for shifts in self.scorer.vectors if shifts), None)
        if shifts is None:
            return True
        probe = shortest_and_longest(rows, lambda row: row.longest)

        def both() -> tuple[list[Answer], list[Answer]]:
            fast = self._probed(path, probe, prefix, [shifts])
            with add_all(self.scorer.backbone, shifts):
                return fast, self._probed(path, probe, prefix)

        tokens = [len(request[2]) for _, request in self._items(probe)]
        return self.scorer.holds(
            "resumed",
            0,
            both,
            lambda found: answers_differ(*found, tokens, self.scorer.dtype),
            "Each vector is scored by itself: passes cannot start midway",
        )

    def _items(self, rows: Sequence[PackedRow]) -> list[tuple[int, Request]]:
        """The rows' requests with their indices, in order."""
        return [
            (i, self._requests[i]) for i in sorted(option.index for row in rows for option in row.options)
        ]

    def _stock_answers(self, items: Sequence[tuple[int, Request]]) -> list[Answer]:
        states = [self._states[i] for i, _ in items] if self._states else []
        return self.lm.some_stock_answers([request for _, request in items], states)


class Companions:
    """Vectors to score along with the baseline, and their answers by request.

    Requests are identified by a 16-byte digest of their strings, so a thousand documents of four options
    take about half a megabyte per vector.
    """

    def __init__(self, vectors: Sequence[SteeringVector]) -> None:
        self.shifts = [layer_shifts(vector) for vector in vectors]
        self.paths: Counter[str] = Counter()
        self._names = [vector.digest() for vector in vectors]
        self._answers: dict[str, dict[bytes, Answer]] = {name: {} for name in self._names}

    def keep(self, strings: Sequence[str], answers: Sequence[Answer]) -> None:
        """Store the answers of all vectors, in order, to one request."""
        key = _key(strings)
        for name, answer in zip(self._names, answers, strict=True):
            self._answers[name][key] = answer

    def answers(self, vector: SteeringVector, requests: Sequence[Sequence[str]]) -> list[Answer | None]:
        """The vector's answers to the requests; None for a request that was not scored."""
        mine = self._answers.get(vector.digest(), {})
        return [mine.get(_key(strings)) for strings in requests]


def _key(strings: Sequence[str]) -> bytes:
    return hashlib.blake2b(json.dumps(list(strings)).encode(), digest_size=16).digest()
