"""Loads the demo's data files, which lie beside this module wherever the package is installed."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

HERE = Path(__file__).resolve().parent


def _load(task: str) -> DatasetDict:
    splits = {}
    for split in ("train", "test"):
        lines = (HERE / f"{task}_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        splits[split] = Dataset.from_list([json.loads(line) for line in lines])
    return DatasetDict(splits)


def load_choice(**_: Any) -> DatasetDict:
    """Train and test split of ``aft_demo_choice``; lm-eval's keyword arguments are not needed."""
    return _load("aft_demo_choice")


def load_math(**_: Any) -> DatasetDict:
    """Train and test split of ``aft_demo_math``; lm-eval's keyword arguments are not needed."""
    return _load("aft_demo_math")
