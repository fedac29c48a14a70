"""A key-value cache of fixed buffers, written and read by row and column, and how much fits in a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

Rows = slice | Tensor


class StopForward(Exception):
    """Raised inside a pass once the last block's keys and values are stored: nothing else is needed."""


class RowCache(DynamicCache):
    """A key-value cache of ``rows`` rows and ``capacity`` columns per block.

    Unlike with transformers' own caches, `open` says before each pass which rows and columns the pass
    fills; the pass then sees columns 0 up to those. Columns it must not see are hidden by the
    attention mask, once `hide` has made sure that they hold no NaN.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__()
        self.rows = rows
        self.capacity = capacity
        self._room = rows * capacity
        self._flat: dict[int, tuple[Tensor, Tensor]] = {}
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._at: Rows = slice(0, 0)
        self._start = 0
        self._own: Tensor | None = None
        self._stop_after: int | None = None

    def open(self, at: Rows, start: int | Tensor, stop_after: int | None = None) -> None:
        """The next pass fills columns from ``start`` in the rows ``at``, or each row its own.

        ``start`` then gives them, (rows, tokens), for rows from 0 on; the pass sees columns up to the
        greatest. With ``stop_after`` it ends, by `StopForward`, when that block's keys and values are stored.
        """
        self._own = start if isinstance(start, Tensor) else None
        self._start = int(start.max()) + 1 - start.shape[1] if isinstance(start, Tensor) else start
        self._at, self._stop_after = at, stop_after

    def lay_out(self, rows: int, capacity: int) -> bool:
        """Reuse the memory for so many rows and columns, whose contents are undefined.

        Returns False, and changes nothing, where the memory is too small.
        """
        if rows * capacity > self._room:
            return False
        self.rows, self.capacity = rows, capacity
        for block, (keys, values) in self._buffers.items():
            flat = self._flat[block]
            self._buffers[block] = (self._view(flat[0], keys), self._view(flat[1], values))
        return True

    def hide(self, first: int, lengths: Sequence[int], end: int) -> None:
        """Zero the columns after the contexts of rows ``first`` on, up to column ``end``.

        A mask hides those columns, but not NaN there (from an earlier row that overflowed, or from padding).
        """
        for keys, values in self._buffers.values():
            for row, length in enumerate(lengths, first):
                keys[row, :, length:end] = 0
                values[row, :, length:end] = 0

    def prefix(self, length: int) -> dict[int, tuple[Tensor, Tensor]]:
        """A copy of row 0's first ``length`` columns, by block."""
        return {
            block: (keys[:1, :, :length].clone(), values[:1, :, :length].clone())
            for block, (keys, values) in self._buffers.items()
        }

    def load(self, prefix: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Write what `prefix` returned into the first columns of every row."""
        for block, (keys, values) in prefix.items():
            mine = self._buffer(block, keys, values)
            mine[0][:, :, : keys.shape[2]] = keys
            mine[1][:, :, : values.shape[2]] = values

    def move(self, source: int, target: int) -> None:
        """Overwrite row ``target`` with row ``source``."""
        for keys, values in self._buffers.values():
            keys[target] = keys[source]
            values[target] = values[source]

    def _buffer(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if block not in self._buffers:
            k, v = (
                torch.zeros(self._room * t.shape[1] * t.shape[3], dtype=t.dtype, device=t.device)
                for t in (keys, values)
            )
            self._flat[block] = (k, v)
            self._buffers[block] = (self._view(k, keys), self._view(v, values))
        return self._buffers[block]

    def _view(self, flat: Tensor, like: Tensor) -> Tensor:
        """Shape (rows, heads, capacity, width), with the heads and width of ``like``."""
        shape = (self.rows, like.shape[1], self.capacity, like.shape[3])
        return flat[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)

    # Called by the model:

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (rows, heads, tokens, width); return all that the pass may see."""
        keys, values = self._buffer(layer_idx, key_states, value_states)
        end = self._start + key_states.shape[2]
        if self._own is not None:
            places = (torch.arange(len(self._own), device=keys.device)[:, None], self._own.to(keys.device))
            keys.transpose(1, 2)[places] = key_states.transpose(1, 2)
            values.transpose(1, 2)[places] = value_states.transpose(1, 2)
            return keys[self._at, :, :end], values[self._at, :, :end]
        keys[self._at, :, self._start : end] = key_states
        values[self._at, :, self._start : end] = value_states
        if layer_idx == self._stop_after:
            raise StopForward
        if self._start == 0:
            return key_states, value_states
        return keys[self._at, :, :end], values[self._at, :, :end]

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
        """Columns before those that the pass fills."""
        return self._start

    def get_mask_sizes(self, query_length: Any, *_args: Any, **_kwargs: Any) -> tuple[int, int]:
        """Columns that the pass sees, counted from column 0."""
        return self._start + int(query_length), 0


@dataclass(frozen=True)
class Budget:
    """Most tokens (rows x width) in one pass, most of them scored, and most bytes of keys and values."""

    tokens: int
    scored: int
    cache: int

    @classmethod
    def of(cls, device: torch.device, reordered: bool = False) -> Budget:
        """What keeps the device busy: a few hundred tokens on a CPU, where padding only costs time.

        With reordered weights fewer, so that their logits stay in the CPU's cache.
        """
        if device.type != "cpu":
            return cls(16384, 4096, 4 << 30)
        tokens = 128 * torch.get_num_threads() if reordered else 1024
        return cls(min(tokens, 1024), min(tokens, 512), 384 << 20)

    def halved(self) -> Budget:
        """Half of everything."""
        return Budget(max(1, self.tokens // 2), max(1, self.scored // 2), self.cache // 2)
