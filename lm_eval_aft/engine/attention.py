"""Attention that skips pairs of tokens which the mask rules out, in packed rows and in decoding.

Kernels given a mask compute every pair of tokens. A packed row's prefix attends causally, so it runs as
causal attention, which skips half the pairs; and the branches that follow do not see each other, so each
runs by itself against the prefix and its own tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WORTHWHILE = 128  # with fewer causal tokens, splitting costs more than it saves


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
    """Inside the block ``attention`` replaces PyTorch's and gets its arguments by name."""
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


# Parts of masks, shared by all blocks, by the mask and the place in it.
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
    """All rows at once: the first ``tokens`` tokens causally, the rest under the mask."""
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
    # Split once: the gradient of each slice would be a whole tensor padded with zeros.
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


# Decoding: a few queries per row, against all that the row has read.

ROWS_TOGETHER = 4  # rows per call: with fewer the call takes longer than the computation


@contextmanager
def over_columns(seen: Sequence[int], device: torch.device) -> Iterator[None]:
    """Inside the block, attention reads only the keys and values that rows may see.

    Kernels given a mask read as many for every row as for the longest.

    Args:
        seen: how many of the first columns each row sees at most; the mask hides the others.
        device: where the passes run. On an accelerator all rows at once are faster, and nothing changes.
    """
    with instead(lambda named: _by_columns(named, seen)) if device.type == "cpu" else nullcontext():
        yield


def _by_columns(named: dict[str, Any], seen: Sequence[int]) -> Tensor:
    """A few rows at a time, with the columns that these see."""
    query, key, value, mask = named["query"], named["key"], named["value"], named.get("attn_mask")
    if mask is None or mask.dim() != 4 or mask.shape[-1] != key.shape[-2] or len(query) != len(seen):
        return F.scaled_dot_product_attention(**named)
    rest = {k: v for k, v in named.items() if k not in ("query", "key", "value", "attn_mask")}
    masks = mask.expand(len(seen), *mask.shape[1:])
    plain = not any(rest.get(option) for option in ("dropout_p", "is_causal", "enable_gqa"))
    by_numpy = plain and numpy_is_faster() and all(map(_plain_fp32, (query, key, value, mask)))
    found = []
    for first in range(0, len(seen), ROWS_TOGETHER):
        rows = slice(first, first + ROWS_TOGETHER)
        columns = max(seen[rows])
        some = query[rows], key[rows, :, :columns], value[rows, :, :columns], masks[rows, ..., :columns]
        if by_numpy:
            found.append(_by_numpy(*some, rest.get("scale")))
        else:
            found.append(F.scaled_dot_product_attention(*some, **rest))
    return torch.cat(found)


def _plain_fp32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and not tensor.requires_grad


@cache
def numpy_is_faster() -> bool:
    """Whether numpy computes products of a few rows faster than PyTorch does.

    PyTorch uses MKL, whose products read keys and values at a third of the memory bandwidth on AMD
    processors (measured, 1 to 4 queries); numpy uses OpenBLAS, which reads them at more than half. With one
    thread only: OpenBLAS would parallelise each of many small products.
    """
    cpu = Path("/proc/cpuinfo")
    amd = cpu.is_file() and "AuthenticAMD" in cpu.read_text()
    alone = os.environ.get("OMP_NUM_THREADS") == "1" and torch.get_num_threads() == 1
    return amd and alone and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


def _by_numpy(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention (rows, heads, queries, width) under an additive mask."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.from_numpy(np.matmul(key.numpy(), query.numpy().swapaxes(-1, -2)))
    # Queries x columns, contiguous, for the softmax and the second product.
    weights = torch.empty(query.shape[:-1] + key.shape[-2:-1])
    torch.add(mask, scores.transpose(-1, -2), alpha=scale, out=weights)
    return torch.from_numpy(np.matmul(weights.softmax(-1).numpy(), value.numpy()))
