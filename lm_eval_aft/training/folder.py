"""The folder a training run writes into: opening it, and what a finished one holds."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import Any

from lm_eval_aft.alone import LOCK
from lm_eval_aft.errors import AFTError
from lm_eval_aft.training.ledger import LEDGER, Ledger, State, load_state, save_state
from lm_eval_aft.training.record import now
from lm_eval_aft.vector import FILE_NAME

PICTURE = "sweep.png"
SEEDS = "seeds"


def check_output(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse an output folder that holds something, unless told what to do with it.

    Even then only a folder that a training run began is touched: overwriting empties it.
    """
    if folder.exists() and not folder.is_dir():
        raise AFTError(f"The output {folder} is a file.", "Give a folder.")
    if not folder.is_dir() or all(each.name == LOCK for each in folder.iterdir()):
        return
    if not (resume or overwrite):
        raise AFTError(
            f"The output folder {folder} is not empty.",
            "Choose another one, go on with --resume, or replace it with --overwrite.",
        )
    if not (folder / LEDGER).exists():
        raise AFTError(
            f"The output folder {folder} is not empty, and no training run wrote what is in it.",
            "Choose another folder.",
        )


def digest(documents: object) -> str:
    """SHA-256 of what a run reads: data, YAML, tokenizer or window may change before it is resumed.

    Args:
        documents: nested tuples, lists, strings and numbers, or dataclasses of them.
    """
    return hashlib.sha256(repr(documents).encode()).hexdigest()


def open_run(folder: Path, settings: dict[str, Any], resume: bool) -> tuple[Ledger, dict[str, State]]:
    """The ledger of a run, begun anew or taken up, and the states of the candidates it had.

    Raises:
        AFTError: the run in the folder is finished or had other settings, or nothing can be written.
    """
    check_output(folder, resume=True)
    ledger = Ledger(folder)
    if resume and folder.exists():
        _sweep_up(folder)
        saved = load_state(folder, settings, ledger)
        if saved is not None:
            return ledger, saved
        if (folder / FILE_NAME).exists():
            raise AFTError(f"The run in {folder} is finished.", "Replace it with --overwrite.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _empty(folder)
    except OSError as error:
        raise AFTError(f"Cannot write into {folder}: {error.strerror}.", "Choose another folder.") from error
    ledger.append(
        event="start", time=now(), settings={k: v for k, v in settings.items() if k != "fingerprint"}
    )
    save_state(folder, settings, ledger, ())
    return ledger, {}


def _empty(folder: Path) -> None:
    """Delete a former run. Its vector goes first and its ledger last: dying half-way leaves no finished
    run, and one that still is known as a run."""
    order = {FILE_NAME: 0, LEDGER: 2}
    for each in sorted(folder.iterdir(), key=lambda path: order.get(path.name, 1)):
        if each.name == LOCK:
            continue
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()


def _sweep_up(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while it wrote."""
    for each in folder.rglob(".*.tmp"):
        with contextlib.suppress(OSError):
            each.unlink()


def seed_file(folder: Path, seed: int) -> Path:
    """Where a run keeps the finalist of a seed."""
    return folder / SEEDS / f"seed-{seed}.safetensors"
