"""Asking stock code: how many rows at once, and one by one where its rows must be known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

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
