"""Guesses at a row's next tokens, and how many of them a pass reads."""

from __future__ import annotations

import pytest

from lm_eval_aft.engine.generation import ATTENTION_PER_GUESS, WIDEST, Followers, Width, Words


def words(tokens: list[int], others: Followers | None = None) -> Words:
    return Words(tokens, Followers() if others is None else others)


def test_what_followed_before_follows_again() -> None:
    assert words([1, 2, 3, 4, 5, 6, 1, 2]).guess(3) == [3, 4, 5]


def test_what_followed_most_often_counts() -> None:
    assert words([1, 7, 8, 1, 9, 5, 1, 7, 0, 1]).guess(1) == [7]


def test_of_equals_the_last_counts() -> None:
    assert words([1, 7, 8, 1, 9, 5, 1]).guess(2) == [9, 5]
    assert words([1, 9, 8, 1, 7, 5, 1]).guess(2) == [7, 5]


def test_the_longest_span_counts() -> None:
    """After 2 came 9 most often, after 1 2 came 3, and after 0 1 2 came 4."""
    before = [2, 9, 7, 2, 9, 7, 2, 9, 8, 1, 2, 3, 7, 1, 2, 3, 0, 1, 2, 4, 5]
    assert words([*before, 0, 1, 2]).guess(1) == [4]
    assert words([*before, 6, 1, 2]).guess(1) == [3]
    assert words([*before, 6, 7, 2]).guess(1) == [9]


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_a_row_that_repeats_itself_goes_on(period: int) -> None:
    row = list(range(period)) * 4
    assert words(row).guess(7) == [k % period for k in range(7)]


def test_nothing_is_guessed_from_nothing() -> None:
    assert words([]).guess(3) == []
    assert words([1, 2, 3]).guess(3) == []


def test_tokens_written_are_known_like_those_of_the_prompt() -> None:
    row = words([5])
    for token in (6, 7, 8, 6, 7):
        row.append(token)
    assert row.guess(4) == [8, 6, 7, 8]
    assert row.guess(4) == words([5, 6, 7, 8, 6, 7]).guess(4)


def test_what_a_row_wrote_counts_for_more_than_its_prompt() -> None:
    row = words([1, 7, 2, 1, 7, 2, 1, 7, 2])
    for token in (1, 8, 2):
        row.append(token)
    assert row.guess(2) == [1, 8]


def test_rows_learn_from_outputs_of_others_and_not_from_their_prompts() -> None:
    others = Followers()
    first, second = words([1, 2, 3], others), words([9, 2], others)
    assert second.guess(1) == []
    for token in (4, 5, 2, 6):
        first.append(token)
    assert second.guess(3) == [6]
    assert words([3, 4], others).guess(9) == [5, 2, 6]
    # Its own text counts too, one output for more than one prompt.
    assert words([2, 8, 2], others).guess(1) == [6]
    assert words([2, 8, 2, 8, 2, 8, 2, 8, 2], others).guess(1) == [8]


def test_outputs_are_forgotten_when_they_are_many() -> None:
    others = Followers(most=10)
    row = words([], others)
    for token in range(100):
        row.append(token)
        assert len(others) <= 12  # a token adds at most three
    row.append(0)
    assert words([98], others).guess(1) == [99]
    assert words([50], others).guess(1) == []
    assert words([50], Followers()).guess(1) == []
    assert row.guess(1) == [1]  # its own text is kept


def make(accuracy: float, parameters: int = 0, kept: int = 1000) -> Width:
    width = Width(parameters, 4, kept)
    for n in range(1000):
        width.observe([1], int(n < 1000 * accuracy))
    return width


def test_passes_that_wait_for_memory_read_many_guesses_where_they_are_right() -> None:
    chosen = [make(accuracy).choose(64, 1000, 99) for accuracy in (0.0, 0.3, 0.5, 0.7, 0.95)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 1
    assert chosen[-1] == WIDEST
    assert make(0.95).choose(64, 1000, 3) == 3


def test_passes_that_wait_for_products_read_none() -> None:
    busy = make(0.7, parameters=500_000_000)
    assert busy.choose(64, 100, 99) == 1
    # Few rows wait for the weights, whatever they read.
    assert busy.choose(1, 100, 99) > 3


def test_no_guess_is_a_wrong_one() -> None:
    width = make(0.5)
    before = width.choose(64, 1000, 99)
    for _ in range(5000):
        width.observe([], 1)
    assert width.choose(64, 1000, 99) < before


@pytest.mark.parametrize(
    ("accuracy", "parameters", "rows", "columns"), [(0.6, 10**7, 64, 1000), (0.4, 10**8, 8, 300)]
)
def test_the_width_is_the_one_with_most_tokens_for_its_time(
    accuracy: float, parameters: int, rows: int, columns: int
) -> None:
    """By the roofline's own arithmetic: bytes moved, or operations at ten to the byte."""
    kept = 30_000
    width = make(accuracy, parameters, kept)
    right = (1000 * accuracy + 1) / 1002
    rates = {}
    for n in range(1, WIDEST + 1):
        tokens = (1 - right**n) / (1 - right)
        read = max(4 * parameters, 2 * parameters * rows * n / 10) + kept * rows * columns * (
            1 + ATTENTION_PER_GUESS * (n - 1)
        )
        rates[n] = tokens / read
    assert width.choose(rows, columns, 99) == max(rates, key=lambda n: rates[n])
