"""The plain way, slow and obviously right: whole passes without a cache, a row at a time.

Shares nothing with what it judges but the model and the place of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Which tokens are steered, by the place of a token and the number of the prompt's tokens.
STEERED: dict[str, Callable[[int, int], bool]] = {
    "all": lambda place, prompt: True,
    "prompt": lambda place, prompt: place < prompt,
    "last": lambda place, prompt: place == prompt - 1,
    "generated": lambda place, prompt: place >= prompt,
}


@contextmanager
def _added(block: Any, vector: Tensor | None, places: Sequence[bool]) -> Iterator[None]:
    """Add ``vector`` to what ``block`` returns at the places that are true, in passes over one row."""
    if vector is None:
        yield
        return
    delta = torch.tensor(places, dtype=vector.dtype)[:, None] * vector

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([output[0] + delta.to(output[0]), *output[1:]])
        return output + delta.to(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def logits(
    model: Any, block: Any, ids: Sequence[int], prompt: int, vector: Tensor | None, positions: str
) -> Tensor:
    """Logits (tokens, vocabulary) of one row whose first ``prompt`` tokens are the prompt."""
    places = [STEERED[positions](place, prompt) for place in range(len(ids))]
    with _added(block, vector, places):
        row: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return row.float().cpu()


def log_likelihood(
    model: Any, block: Any, context: Sequence[int], tail: Sequence[int], vector: Tensor | None, positions: str
) -> float:
    """Log-likelihood (nats) of ``tail`` after ``context``."""
    row = logits(model, block, [*context, *tail[:-1]], len(context), vector, positions)
    chosen = row.log_softmax(-1)[len(context) - 1 :]
    return float(chosen[torch.arange(len(tail)), torch.tensor(tail)].sum())


def greedy(
    model: Any, block: Any, prompt: Sequence[int], most: int, vector: Tensor | None, positions: str
) -> tuple[list[int], list[float]]:
    """The greedy continuation, up to ``most`` tokens or the end of the text, and each token's lead.

    The lead is how far the token's logit lies above the next one's.
    """
    tokens: list[int] = []
    leads: list[float] = []
    while len(tokens) < most and not (tokens and tokens[-1] == model.config.eos_token_id):
        last = logits(model, block, [*prompt, *tokens], len(prompt), vector, positions)[-1]
        first, second = last.topk(2).values.tolist()
        tokens.append(int(last.argmax()))
        leads.append(first - second)
    return tokens, leads
