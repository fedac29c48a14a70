"""Attention as the fast passes compute it: without work a mask would throw away, and in a quick precision.

Kernels given a mask compute every pair of tokens. A packed row's prefix attends causally and to nothing
later, so its part runs as causal attention, which skips half the pairs; and the branches that follow do not
see each other, so each runs by itself against the prefix and its own tokens.

On CPUs the backward kernel for 16 bits takes two to three times as long as the one for float32 (torch 2.13),
and the forward kernels as long as each other: where gradients are wanted, attention runs in float32 there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WORTHWHILE = 128  # causal tokens below which cutting in two costs more than it saves


@dataclass(frozen=True)
class Parts:
    """How a packed row is divided.

    Attributes:
        prefix: tokens at its start, which attend causally.
        branches: (start, end) of what follows, one after the other; none sees another.
    """

    prefix: int
    branches: tuple[tuple[int, int], ...]


@contextmanager
def fast_attention(rows: Sequence[Parts], width: int, like: Tensor) -> Iterator[None]:
    """Compute attention as the module says during the passes made inside the block.

    Args:
        rows: how each row is divided; empty where there is no mask.
        width: tokens in a row; masked attention over other lengths is not divided.
        like: any of the model's parameters.
    """
    divided = bool(rows) and min(row.prefix for row in rows) >= WORTHWHILE
    widened = like.device.type == "cpu" and like.dtype in _SHORT and torch.is_grad_enabled()
    if not divided and not widened:
        yield
        return
    with _Attention(rows if divided else (), width, widened):
        yield


_SHORT = (torch.bfloat16, torch.float16)
_ORDER = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _Attention(TorchFunctionMode):
    def __init__(self, rows: Sequence[Parts], width: int, widened: bool) -> None:
        super().__init__()
        self._rows, self._width, self._widened = rows, width, widened

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **options)
        named = {**dict(zip(_ORDER, args, strict=False)), **options}
        dtype = named["query"].dtype
        if self._widened and dtype in _SHORT:
            named = {key: _wide(value) for key, value in named.items()}
        return _attention(named, self._rows, self._width).to(dtype)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(named: dict[str, Any], rows: Sequence[Parts], width: int) -> Tensor:
    query, key, mask = named["query"], named["key"], named.get("attn_mask")
    square = (width, width)
    fits = mask is not None and mask.shape[-2:] == square == (query.shape[-2], key.shape[-2])
    if mask is None or not rows or not fits or named.get("is_causal"):
        return F.scaled_dot_product_attention(**named)
    value = named["value"]
    rest = {k: v for k, v in named.items() if k not in ("query", "key", "value", "attn_mask", "is_causal")}
    if all(len(row.branches) == 1 for row in rows):
        return _in_two(query, key, value, mask, min(row.prefix for row in rows), rest)
    found = []
    for r, row in enumerate(rows):
        one = slice(r, r + 1)
        its_mask = mask[one] if len(mask) > 1 else mask
        found.append(_by_branch(query[one], key[one], value[one], its_mask, row, rest))
    return torch.cat(found)


def _in_two(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, tokens: int, rest: dict[str, Any]
) -> Tensor:
    """All rows at once: so many first tokens causally, what follows under the mask."""
    first = F.scaled_dot_product_attention(
        query[..., :tokens, :], key[..., :tokens, :], value[..., :tokens, :], is_causal=True, **rest
    )
    last = F.scaled_dot_product_attention(
        query[..., tokens:, :], key, value, attn_mask=mask[..., tokens:, :], **rest
    )
    return torch.cat([first, last], dim=-2)


def _by_branch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, row: Parts, rest: dict[str, Any]
) -> Tensor:
    """One row: the prefix causally, every branch against the prefix and itself."""
    n = row.prefix
    prefix_key, prefix_value = key[..., :n, :], value[..., :n, :]
    found = [
        F.scaled_dot_product_attention(query[..., :n, :], prefix_key, prefix_value, is_causal=True, **rest)
    ]
    for start, end in row.branches:
        if start == end:
            continue
        seen = mask[..., start:end, :]
        own = torch.cat([seen[..., :n], seen[..., start:end]], dim=-1)
        keys = torch.cat([prefix_key, key[..., start:end, :]], dim=-2)
        values = torch.cat([prefix_value, value[..., start:end, :]], dim=-2)
        found.append(
            F.scaled_dot_product_attention(query[..., start:end, :], keys, values, attn_mask=own, **rest)
        )
    last = row.branches[-1][1]
    if last < query.shape[-2]:  # padding, which nothing reads
        found.append(torch.zeros_like(query[..., last:, :]))
    return torch.cat(found, dim=-2)
