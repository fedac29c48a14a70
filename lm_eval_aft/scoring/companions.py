"""Answers of further vectors, found while the baseline was scored and kept until their turn."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

from lm_eval_aft.scoring.requests import Answer
from lm_eval_aft.steering import deltas
from lm_eval_aft.vector import SteeringVector


class Companions:
    """Vectors to score along with the baseline, and their answers by request.

    A request is known by a 16-byte digest of its strings, so a thousand documents of four options
    take about half a megabyte a vector.
    """

    def __init__(self, vectors: Sequence[SteeringVector]) -> None:
        self.shifts = [deltas(vector) for vector in vectors]
        self.paths: Counter[str] = Counter()
        self._names = [vector.digest() for vector in vectors]
        self._answers: dict[str, dict[bytes, Answer]] = {name: {} for name in self._names}

    def keep(self, strings: Sequence[str], answers: Sequence[Answer]) -> None:
        """Store the answers of all vectors, in order, to one request."""
        key = _key(strings)
        for name, answer in zip(self._names, answers, strict=True):
            self._answers[name][key] = answer

    def answers(self, vector: SteeringVector, requests: Sequence[Sequence[str]]) -> list[Answer | None]:
        """The vector's answers to the requests; None where it was not found."""
        mine = self._answers.get(vector.digest(), {})
        return [mine.get(_key(strings)) for strings in requests]


def _key(strings: Sequence[str]) -> bytes:
    return hashlib.blake2b(json.dumps(list(strings)).encode(), digest_size=16).digest()
