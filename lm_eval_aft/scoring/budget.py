"""How much one pass may hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Budget:
    """Most tokens (rows x width) in one pass, most of them scored, and most bytes of keys and values."""

    tokens: int
    scored: int
    cache: int

    @classmethod
    def of(cls, device: torch.device, reordered: bool = False) -> Budget:
        """What keeps the device busy: a CPU is with a few hundred tokens, and padding only costs it.

        With reordered weights it is with fewer, whose logits then stay in its cache.
        """
        if device.type != "cpu":
            return cls(16384, 4096, 4 << 30)
        tokens = 128 * torch.get_num_threads() if reordered else 1024
        return cls(min(tokens, 1024), min(tokens, 512), 384 << 20)

    def halved(self) -> Budget:
        """Half of everything."""
        return Budget(max(1, self.tokens // 2), max(1, self.scored // 2), self.cache // 2)
