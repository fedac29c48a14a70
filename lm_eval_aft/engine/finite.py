"""Answers that are NaN or infinite: noticed while they are computed, and a baseline's refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft._util.errors import AFTError, not_finite_cause

_PROMPT = "Question: What is the capital of France?\nAnswer: Paris"


def baseline_not_finite(model: Any) -> AFTError:
    """The error to raise where a model's answers are not finite, and no vector steers it."""
    dtype = str(model.dtype).removeprefix("torch.")
    return AFTError(
        f"The model gives NaN or infinite numbers in {dtype}, without any vector.",
        f"The reason: {not_finite_cause(dtype)}",
    )


def require_finite(lm: Any) -> None:
    """Read one short prompt with a model that nothing steers.

    Args:
        lm: lm-eval's ``hf`` model, or one derived from it.

    Raises:
        AFTError: its logits are not finite; the dtype is blamed.
    """
    ids = [lm.prefix_token_id, *lm.tok_encode(_PROMPT, add_special_tokens=False)][: lm.max_length]
    autocast = lm.mixed_precision_dtype
    with torch.no_grad(), torch.autocast(lm.device.type, dtype=autocast, enabled=autocast is not None):
        logits = lm.model(torch.tensor([ids], device=lm.device)).logits
    if not bool(finite(logits).all()):
        raise baseline_not_finite(lm.model)


def finite(logits: Tensor) -> Tensor:
    """Whether each position's logits (..., vocabulary) choose a token: none NaN, the largest finite."""
    return logits.amax(-1).isfinite()


@contextmanager
def watched(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside the block count the passes whose last positions' logits were not all `finite`."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    odd: list[Tensor] = []

    def look(_module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        found = (~finite(logits[..., -1, :])).any()
        odd[:] = [odd[0] + found] if odd else [found.long()]  # counted on the device, which need not wait

    handle = head.register_forward_hook(look) if isinstance(head, nn.Module) else None
    try:
        yield lambda: int(odd[0]) if odd else 0
    finally:
        if handle is not None:
            handle.remove()
