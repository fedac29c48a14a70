"""Guesses at a row's next tokens, from what the prompts and the outputs have said before.

A pass that reads a guess behind a row's last token tells whether greedy decoding would have written it,
and every right guess saves a pass. This is prompt-lookup decoding (Saxena 2023; Yang et al. 2023,
arXiv:2304.04487) for batches: rows learn from each other's outputs, and the guesses are as long as pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Most tokens looked up together, and most tokens read in one pass of a row: its last one and its guesses.
SPAN = 3
WIDEST = 8
# Floating-point operations that take as long as reading a byte (CPUs measured: 8; an H200 in fp32: 14).
OPERATIONS_PER_BYTE = 10
# How much longer attention takes for each token more that a row has in a pass (measured: 0.06 to 0.1).
ATTENTION_PER_GUESS = 0.08

Seen = dict[tuple[int, ...], tuple[list[int], int]]


class Words:
    """The tokens of one row so far, and what follows each of its spans of up to ``SPAN`` tokens.

    Args:
        tokens: the prompt.
        others: what follows spans in the outputs of all rows; added to as this one is continued.
    """

    def __init__(self, tokens: Iterable[int], others: Seen) -> None:
        self._tokens = list(tokens)
        self._others = others
        # Of a span that occurs more than once the last is kept.
        self._next = {
            span: dict(
                zip(
                    zip(*(self._tokens[i:] for i in range(span)), strict=False),
                    range(span, len(self._tokens)),
                    strict=False,
                )
            )
            for span in range(SPAN, 0, -1)
        }

    def append(self, token: int) -> None:
        """The row's next token."""
        here = len(self._tokens)
        for span, following in self._next.items():
            if span <= here:
                key = tuple(self._tokens[-span:])
                following[key] = here
                self._others[key] = (self._tokens, here)
        self._tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """Up to ``count`` tokens that may come next: what followed the longest span seen before."""
        here = len(self._tokens)
        for span, following in self._next.items():
            key = tuple(self._tokens[-span:])
            if key in following:
                # A row that copies itself goes on copying what it has copied.
                start = following[key]
                return [self._tokens[start + k % (here - start)] for k in range(count)]
            if key in self._others:
                tokens, start = self._others[key]
                return tokens[start : start + count]
        return []


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
