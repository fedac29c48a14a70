"""Attention over packed rows without the work a mask would only throw away.

Kernels given a mask compute every pair of tokens. The first tokens of all rows of a batch, up to the
shortest context, attend causally and to nothing later, so their part runs as causal attention, which
skips half the pairs; only what follows needs the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WORTHWHILE = 128  # causal tokens below which cutting in two costs more than it saves


@contextmanager
def causal_prefix(tokens: int, width: int) -> Iterator[None]:
    """Compute masked attention in two parts during the passes made inside the block.

    Args:
        tokens: how many tokens at the start of every row attend causally under the mask given.
        width: tokens in a row; attention over other lengths is left alone.
    """
    if tokens < WORTHWHILE:
        yield
        return
    with _TwoParts(tokens, width):
        yield


_ORDER = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _TwoParts(TorchFunctionMode):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self._tokens, self._width = tokens, width

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **options)
        named = dict(
            zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)
        )
        named |= options
        return _attention(named, self._tokens, self._width)


def _attention(named: dict[str, Any], tokens: int, width: int) -> Tensor:
    query, key, mask = named["query"], named["key"], named.get("attn_mask")
    square = (width, width)
    fits = mask is not None and mask.shape[-2:] == square == (query.shape[-2], key.shape[-2])
    if mask is None or not fits or named.get("is_causal"):
        return F.scaled_dot_product_attention(**named)
    rest = {k: v for k, v in named.items() if k not in ("query", "key", "value", "attn_mask", "is_causal")}
    value = named["value"]
    first = F.scaled_dot_product_attention(
        query[..., :tokens, :], key[..., :tokens, :], value[..., :tokens, :], is_causal=True, **rest
    )
    last = F.scaled_dot_product_attention(
        query[..., tokens:, :], key, value, attn_mask=mask[..., tokens:, :], **rest
    )
    return torch.cat([first, last], dim=-2)
