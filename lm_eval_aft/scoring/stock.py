"""Asking stock code: how many rows at once, and one by one where its rows must be known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lm_eval_aft.positions import roles, row_roles
from lm_eval_aft.scoring.requests import Answer, Request

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
