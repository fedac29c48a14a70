"""Attention of rows that are decoded together: a few queries each, against all that the row has seen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lm_eval_aft.attention import instead

ROWS_TOGETHER = 4  # rows in one call: fewer take longer to call than to compute


@contextmanager
def over_columns(seen: Sequence[int], device: torch.device) -> Iterator[None]:
    """Read only the keys and values that rows may see, during the passes made inside the block.

    Kernels given a mask read as many for every row as the longest has tokens.

    Args:
        seen: how many of the first columns each row sees at most; the mask hides the others from it.
        device: where the passes run. An accelerator would rather have all rows at once, and does.
    """
    with instead(lambda named: _by_columns(named, seen)) if device.type == "cpu" else nullcontext():
        yield


def _by_columns(named: dict[str, Any], seen: Sequence[int]) -> Tensor:
    """A few rows at a time, as many columns as these see."""
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
    """Whether numpy multiplies a few rows with many faster than PyTorch does.

    PyTorch's products are MKL's, and attention by them reads keys and values at a third of the memory's
    speed on AMD's processors (measured, 1 to 4 queries); with numpy's, which are OpenBLAS's, at more than
    half. With one thread only: OpenBLAS would share out each of many small products.
    """
    cpu = Path("/proc/cpuinfo")
    amd = cpu.is_file() and "AuthenticAMD" in cpu.read_text()
    alone = os.environ.get("OMP_NUM_THREADS") == "1" and torch.get_num_threads() == 1
    return amd and alone and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


def _by_numpy(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention (rows, heads, queries, width) under an additive mask."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.from_numpy(np.matmul(key.numpy(), query.numpy().swapaxes(-1, -2)))
    # Queries by columns again, one after the other in memory, for the softmax and for the product.
    weights = torch.empty(query.shape[:-1] + key.shape[-2:-1])
    torch.add(mask, scores.transpose(-1, -2), alpha=scale, out=weights)
    return torch.from_numpy(np.matmul(weights.softmax(-1).numpy(), value.numpy()))
