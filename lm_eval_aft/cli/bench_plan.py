"""What ``aft bench --dry-run`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lm_eval_aft.bench.study import BenchStudy


def print_plan(study: BenchStudy, output: Path | None, only: Sequence[str]) -> None:
    """Print it."""
    raise NotImplementedError
