"""Tokenised log-likelihood requests, gathered into questions whose options share a context."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_aft.steering.hooks import layer_shifts
from lm_eval_aft.steering.vector import SteeringVector

# What lm-eval hands to `_loglikelihood_tokens`: (strings or None, context ids, continuation ids).
Request = tuple[Any, list[int], list[int]]
# Summed log-likelihood in nats, and whether greedy decoding would have written the continuation.
Answer = tuple[float, bool]

# A question with more tokens in its options than this becomes several: the mask grows with the square.
MOST_NODES = 1024
# A prefix common to many questions is worth a pass of its own from here on, in tokens.
SHORTEST_PREFIX = 32
# Nor is it below this many tokens saved.
SMALLEST_GAIN = 256


@dataclass(frozen=True)
class Option:
    """One request: ``nodes[k]`` of its question's tree predicts ``targets[k]``."""

    index: int
    nodes: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A context and its continuations, merged into a tree where they begin alike.

    Attributes:
        context: token ids of the context without its last token; may be empty.
        tokens: token ids of the tree's nodes; node 0 is the context's last token. The last token
            of a continuation is only predicted, so it has no node.
        parents: the node before each node; -1 for node 0.
        options: the requests answered.
        state: which vector steers it, where several do; see `lm_eval_aft.steering.hooks.RowSteering`.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    options: tuple[Option, ...]
    state: int = 0

    @property
    def length(self) -> int:
        """Tokens in the whole question."""
        return len(self.context) + len(self.tokens)

    @property
    def rows(self) -> int:
        """How many different rows its options would need without sharing."""
        return len({option.nodes for option in self.options})

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: the context and one continuation, its last token included."""
        return len(self.context) + 1 + max(len(option.targets) for option in self.options)

    def depths(self) -> list[int]:
        """Distance of each node from node 0."""
        found = [0]
        for parent in self.parents[1:]:
            found.append(found[parent] + 1)
        return found


def gather(requests: Iterable[tuple[int, Request]], states: Sequence[int] = ()) -> list[Question]:
    """Questions in order of appearance: consecutive requests with the same context belong together.

    ``states`` gives each request's state by its index; default all 0.
    """
    questions: list[Question] = []
    current: list[tuple[int, list[int]]] = []
    context: list[int] = []
    state = 0
    for index, (_, head, tail) in requests:
        own = states[index] if states else 0
        full = sum(len(t) for _, t in current) + len(tail) > MOST_NODES
        if current and (head != context or own != state or full):
            questions.append(_question(context, current, state))
            current = []
        context, state = head, own
        current.append((index, tail))
    if current:
        questions.append(_question(context, current, state))
    return questions


def _question(context: Sequence[int], tails: Sequence[tuple[int, list[int]]], state: int) -> Question:
    tokens, parents = [context[-1]], [-1]
    children: dict[tuple[int, int], int] = {}
    options = []
    for index, tail in tails:
        nodes = [0]
        for token in tail[:-1]:
            key = (nodes[-1], token)
            if key not in children:
                children[key] = len(tokens)
                tokens.append(token)
                parents.append(nodes[-1])
            nodes.append(children[key])
        options.append(Option(index, tuple(nodes), tuple(tail)))
    return Question(tuple(context[:-1]), tuple(tokens), tuple(parents), tuple(options), state)


def with_common_prefixes(questions: Sequence[Question]) -> list[tuple[int, list[Question]]]:
    """Split questions into sets whose contexts begin alike: (tokens in common, the questions).

    The last set holds the questions that share no such prefix, with 0 tokens. Prefixes are compared
    by token id, and belong to one state: keys and values depend on the vector. lm-eval often draws few-shot
    examples anew for each document, and then there are none.
    """
    sets: dict[tuple[int, tuple[int, ...]], list[Question]] = {}
    alone: list[Question] = []
    for question in questions:
        if len(question.context) >= SHORTEST_PREFIX:
            key = (question.state, question.context[:SHORTEST_PREFIX])
            sets.setdefault(key, []).append(question)
        else:
            alone.append(question)
    found = []
    for members in sets.values():
        length = _common([question.context for question in members])
        total = sum(len(question.context) for question in members)
        # Behind a prefix attention is no longer plainly causal, which costs long contexts more than
        # a short prefix saves.
        pays = length * (len(members) - 1) >= SMALLEST_GAIN and 4 * length * len(members) >= total
        if pays:
            found.append((length, members))
        else:
            alone += members
    return [*found, (0, alone)] if alone else found


def _common(contexts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all contexts begin with in common."""
    # The smallest and the largest of them differ soonest.
    low, high = min(contexts), max(contexts)
    shorter = min(len(low), len(high))
    return next((i for i in range(shorter) if low[i] != high[i]), shorter)


class Companions:
    """Vectors to score along with the baseline, and their answers by request.

    A request is known by a 16-byte digest of its strings, so a thousand documents of four options
    take about half a megabyte a vector.
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
        """The vector's answers to the requests; None where it was not found."""
        mine = self._answers.get(vector.digest(), {})
        return [mine.get(_key(strings)) for strings in requests]


def _key(strings: Sequence[str]) -> bytes:
    return hashlib.blake2b(json.dumps(list(strings)).encode(), digest_size=16).digest()
