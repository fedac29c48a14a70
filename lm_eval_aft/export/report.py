"""What an export tells about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lm_eval_aft.export.verify import Agreement

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: the file or folder that was written.
        kind: ``merged``, ``peft``, ``gguf`` or ``steered``.
        agreement: the comparison of logits; ``None`` where the format has no loader to ask.
        notes: what people should know, one sentence each.
    """

    path: Path
    kind: str
    agreement: Agreement | None
    notes: list[str]
