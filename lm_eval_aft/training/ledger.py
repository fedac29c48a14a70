"""The append-only JSON Lines file of a run, and the state it resumes from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonlines
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lm_eval_aft.errors import AFTError
from lm_eval_aft.training.fit import Candidate
from lm_eval_aft.vector import canonical_json, replacing

LEDGER = "training.jsonl"
STATE = "state.safetensors"
State = tuple[dict[str, Tensor], dict[str, Any]]  # as `Candidate.restore` takes it


class Ledger:
    """``training.jsonl`` of a run folder: one line per event, written at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        self.lines = 0

    def append(self, **entry: Any) -> None:
        """Add one line."""
        with jsonlines.open(self.path, "a") as writer:
            writer.write(entry)
        self.lines += 1

    def sync(self) -> None:
        """Have all lines on the disk, where no loss of power takes them."""
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())

    def cut(self, lines: int) -> None:
        """Drop what was written after the last saved state."""
        with self.path.open("rb") as stream:
            kept = [line for line, _ in zip(stream, range(lines), strict=False)]
        if len(kept) < lines or not kept[-1].endswith(b"\n"):
            raise AFTError(
                f"{self.path} is shorter than its state file says.", "Start again with --overwrite."
            )
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))
        self.lines = lines


def save_state(
    folder: Path, settings: dict[str, Any], ledger: Ledger, candidates: Iterable[Candidate]
) -> None:
    """Write what `load_state` needs to go on, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for candidate in candidates:
        its_tensors, values[candidate.name] = candidate.state()
        tensors |= {f"{candidate.name}/{key}": value.contiguous() for key, value in its_tensors.items()}
    header = {"settings": settings, "lines": ledger.lines, "candidates": values}
    ledger.sync()
    with replacing(folder / STATE) as temporary:
        save_file(tensors, temporary, metadata={"state": canonical_json(header)})


def load_state(folder: Path, settings: dict[str, Any], ledger: Ledger) -> dict[str, State] | None:
    """The states of an interrupted run's candidates, by name; ``None`` when there was no run.

    The ledger is cut to the lines that had been written when the state was saved.

    Raises:
        AFTError: the state is damaged, or the run had other settings (they are named).
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        differing = [
            key
            for key in sorted({*settings, *header["settings"]})
            if json.loads(canonical_json({"": settings.get(key)}))[""] != header["settings"].get(key)
        ]
        if differing:
            raise AFTError(
                f"The run in {folder} had other settings: {', '.join(differing)} differ.",
                "Resume with the same flags, or start again with --overwrite.",
            )
        states: dict[str, State] = {name: ({}, values) for name, values in header["candidates"].items()}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            states[name][0][part] = tensor
        ledger.cut(header["lines"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise AFTError(f"{path} is damaged ({error!r}).", "Start again with --overwrite.") from error
    return states


def drop_state(folder: Path) -> None:
    """Remove the state of a finished run."""
    (folder / STATE).unlink(missing_ok=True)
