"""Attention without the work a mask would only throw away.

Kernels given a mask compute every pair of tokens. A packed row's prefix attends causally and to nothing
later, so its part runs as causal attention, which skips half the pairs; and the branches that follow do not
see each other, so each runs by itself against the prefix and its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
def in_parts(rows: Sequence[Parts], width: int) -> Iterator[None]:
    """Compute masked attention part by part during the passes made inside the block.

    Args:
        rows: how each row is divided; empty where there is no mask.
        width: tokens in a row; attention over other lengths is left alone.
    """
    if not rows or min(row.prefix for row in rows) < WORTHWHILE:
        yield
        return
    masks: Masks = {}
    with instead(lambda named: _attention(named, rows, width, masks)):
        yield


@contextmanager
def instead(attention: Callable[[dict[str, Any]], Tensor]) -> Iterator[None]:
    """``attention``, given its arguments by name, takes the place of PyTorch's inside the block."""
    with _Instead(attention):
        yield


_ORDER = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _Instead(TorchFunctionMode):
    def __init__(self, attention: Callable[[dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **options)
        return self._attention({**dict(zip(_ORDER, args, strict=False)), **options})


# Pieces of masks, which all blocks share, by the mask they are of and their place in it.
Masks = dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor]


def _attention(named: dict[str, Any], rows: Sequence[Parts], width: int, masks: Masks) -> Tensor:
    query, key, mask = named["query"], named["key"], named.get("attn_mask")
    square = (width, width)
    fits = mask is not None and mask.shape[-2:] == square == (query.shape[-2], key.shape[-2])
    if mask is None or not fits or named.get("is_causal"):
        return F.scaled_dot_product_attention(**named)

    def piece(place: tuple[int, ...], cut: Callable[[Tensor], Tensor]) -> Tensor:
        known = (mask.data_ptr(), tuple(mask.shape), place)
        if known not in masks:
            masks[known] = cut(mask)
        return masks[known]

    rest = {k: v for k, v in named.items() if k not in ("query", "key", "value", "attn_mask", "is_causal")}
    if all(len(row.branches) == 1 for row in rows):
        return _in_two(query, key, named["value"], min(row.prefix for row in rows), piece, rest)
    found = []
    for r, row in enumerate(rows):
        one = slice(r, r + 1)
        found.append(_by_branch(query[one], key[one], named["value"][one], r, row, piece, rest))
    return torch.cat(found)


Piece = Callable[[tuple[int, ...], Callable[[Tensor], Tensor]], Tensor]


def _in_two(
    query: Tensor, key: Tensor, value: Tensor, tokens: int, piece: Piece, rest: dict[str, Any]
) -> Tensor:
    """All rows at once: so many first tokens causally, what follows under the mask."""
    first = F.scaled_dot_product_attention(
        query[..., :tokens, :], key[..., :tokens, :], value[..., :tokens, :], is_causal=True, **rest
    )
    mask = piece((tokens,), lambda whole: whole[..., tokens:, :])
    last = F.scaled_dot_product_attention(query[..., tokens:, :], key, value, attn_mask=mask, **rest)
    return torch.cat([first, last], dim=-2)


def _by_branch(
    query: Tensor, key: Tensor, value: Tensor, r: int, row: Parts, piece: Piece, rest: dict[str, Any]
) -> Tensor:
    """Row ``r``: the prefix causally, every branch against the prefix and itself."""
    ends = [row.prefix, *(end for _, end in row.branches)]
    sizes = [end - start for start, end in zip([0, *ends], [*ends, query.shape[-2]], strict=True)]
    # Split once: the gradient of a slice is a whole table of zeros around it.
    (q, *queries), (k, *keys), (v, *values) = (each.split(sizes, dim=-2) for each in (query, key, value))  # type: ignore[no-untyped-call]
    found = [F.scaled_dot_product_attention(q, k, v, is_causal=True, **rest)]
    for (start, end), own_query, own_key, own_value in zip(row.branches, queries, keys, values, strict=False):
        if start == end:
            continue

        def cut(whole: Tensor, start: int = start, end: int = end) -> Tensor:
            seen = whole[min(r, len(whole) - 1)].unsqueeze(0)[..., start:end, :]
            return torch.cat([seen[..., : row.prefix], seen[..., start:end]], dim=-1)

        mask = piece((r, start, end), cut)
        seen_key, seen_value = torch.cat([k, own_key], dim=-2), torch.cat([v, own_value], dim=-2)
        found.append(F.scaled_dot_product_attention(own_query, seen_key, seen_value, attn_mask=mask, **rest))
    found.append(torch.zeros_like(queries[-1]))  # padding, which nothing reads
    return torch.cat(found, dim=-2)
