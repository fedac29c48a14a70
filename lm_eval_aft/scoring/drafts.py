"""Guesses at a row's next tokens, from what the prompts and the outputs have said before.

A pass that reads a guess behind a row's last token tells whether greedy decoding would have written it,
and every right guess saves a pass. This is prompt-lookup decoding (Saxena 2023; Yang et al. 2023,
arXiv:2304.04487) for batches: what followed most often counts, rows learn from each other's outputs, and
the guesses are as long as pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Most tokens looked up together, and most tokens read in one pass of a row: its last one and its guesses.
SPAN = 3
WIDEST = 8
# How often a token of the row's prompt, of another row's output and of its own output count.
PROMPT, OTHERS, OWN = 1, 3, 6
# Spans that are remembered of outputs (about 400 bytes each); then all are forgotten.
MOST_SPANS = 100_000
# Floating-point operations that take as long as reading a byte (CPUs measured: 8; an H200 in fp32: 14).
OPERATIONS_PER_BYTE = 10
# How much longer attention takes for each token more that a row has in a pass (measured: 0.06 to 0.3).
ATTENTION_PER_GUESS = 0.1


class Followers:
    """How often each token came after each span of up to ``SPAN`` tokens."""

    def __init__(self, most: float = float("inf")) -> None:
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}
        self._most = most

    def __len__(self) -> int:
        """How many spans are known."""
        return len(self._counts)

    def count(self, span: tuple[int, ...], token: int, weight: int) -> None:
        """``token`` came after ``span`` and after what the span ends with."""
        if len(self) >= self._most:
            self._counts.clear()
        for start in range(len(span)):
            counts = self._counts.setdefault(span[start:], {})
            counts[token] = counts.pop(token, 0) + weight  # the last one counted is the last one listed

    def after(self, span: tuple[int, ...]) -> dict[int, int]:
        """The tokens that came after exactly this span, and how often."""
        return self._counts.get(span, {})


class Words:
    """The tokens of one row so far, and what comes next most often.

    Args:
        tokens: the prompt.
        others: what the outputs of all rows said; added to as this one is continued.
    """

    def __init__(self, tokens: Iterable[int], others: Followers) -> None:
        self._last: tuple[int, ...] = ()
        self._own = Followers()
        self._others = others
        for token in tokens:
            self._own.count(self._last, token, PROMPT)
            self._last = (*self._last, token)[-SPAN:]

    def append(self, token: int) -> None:
        """The row's next token."""
        self._own.count(self._last, token, OWN - OTHERS)
        self._others.count(self._last, token, OTHERS)
        self._last = (*self._last, token)[-SPAN:]

    def guess(self, count: int) -> list[int]:
        """Up to ``count`` tokens that may come next, each the one most often seen after those before it."""
        last = self._last
        found: list[int] = []
        while len(found) < count and (token := self._next(last)) is not None:
            found.append(token)
            last = (*last, token)[-SPAN:]
        return found

    def _next(self, last: tuple[int, ...]) -> int | None:
        """What followed most often, the last time later of equals, after the longest span seen before."""
        for start in range(len(last)):
            own, others = self._own.after(last[start:]), self._others.after(last[start:])
            if own or others:
                # Of equals `max` names the first.
                tokens = [*reversed(own), *reversed(others)]
                return max(tokens, key=lambda token: own.get(token, 0) + others.get(token, 0))
        return None


class Width:
    """How many tokens a row should have in the next pass, from how often first guesses were right.

    Reading more tokens saves passes, and with them reading keys and values (and weights, where rows are
    few), but costs products. It is decided by arithmetic, not by a clock: the same rows always make the
    same passes.

    Args:
        parameters: of the blocks and the head, each used once for a token.
        itemsize: bytes of one.
        kept: bytes of keys and values of one token.
    """

    def __init__(self, parameters: int, itemsize: int, kept: int) -> None:
        self._parameters = parameters
        self._itemsize = itemsize
        self._kept = kept
        self._right = 1
        self._made = 2

    def observe(self, guesses: Sequence[int], token: int) -> None:
        """``token`` came where ``guesses`` had been made."""
        self._made += 1
        self._right += guesses[:1] == [token]

    def choose(self, rows: int, columns: int, most: int) -> int:
        """Tokens a row, 1 to ``most``, for ``rows`` rows that see ``columns`` columns."""
        right = self._right / self._made

        def tokens_per_cost(width: int) -> float:
            expected = sum(right**k for k in range(width))
            products = 2 * self._parameters * rows * width / OPERATIONS_PER_BYTE
            attention = self._kept * rows * columns * (1 + ATTENTION_PER_GUESS * (width - 1))
            return expected / (max(products, self._parameters * self._itemsize) + attention)

        return max(range(1, min(most, WIDEST) + 1), key=tokens_per_cost)
