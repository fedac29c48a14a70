"""How many rows stock code may take at once, where trying it out is not possible."""

from __future__ import annotations

from typing import Any

# What one batch may take, in bytes.
STOCK_BATCH_BYTES = 2 << 30


def stock_rows(model: Any, length: int, most: int) -> int:
    """Rows of ``length`` tokens whose logits fit, at least 1 and no more than ``most``."""
    row = 4 * length * model.config.get_text_config().vocab_size
    # Logits, their log-softmax, and as much again for everything else.
    return max(1, min(most, STOCK_BATCH_BYTES // (4 * int(row))))
