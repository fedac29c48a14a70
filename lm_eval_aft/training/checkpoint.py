"""The folder of a training run: its ledger, the state it resumes from, and its progress bar."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import LOCK, JsonLines, canonical_json, replacing
from lm_eval_aft._util.process import Terminated, now
from lm_eval_aft._util.tracking import Trackers
from lm_eval_aft.steering.vector_file import FILE_NAME
from lm_eval_aft.training.candidate import Candidate
from lm_eval_aft.training.selection import Score

SAVE_EVERY = 300.0  # seconds of an unfinished epoch that a crash may cost


class Resumable(Protocol):
    """What a run's state file can hold: a candidate, or another part of a run."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values to resume from; among these ``stopped`` and ``steps``."""


class RunRecorder:
    """Records a sweep's progress in its folder and on the bar.

    Args:
        asked: whether the process was asked to end.
    """

    def __init__(
        self,
        bar: tqdm,
        folder: Path | None,
        settings: dict[str, Any],
        ledger: TrainingLedger | None,
        saved: dict[str, State],
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self._bar, self._folder, self._settings, self._ledger = bar, folder, settings, ledger
        self._dropped = {n for n, (_, values) in saved.items() if values["stopped"] and not values["steps"]}
        self._asked, self._saved_at = asked, time.monotonic()

    def tick(self, done: int, /) -> None:
        """So many more (candidate, document) pairs are finished."""
        self._bar.update(done)

    def epoch(self, candidate: Candidate, baseline: Score) -> None:
        """A candidate has finished an epoch, or was stopped in it."""
        self._bar.set_description(f"{candidate.stage}: layer {candidate.layer}, epoch {candidate.epoch}")
        if self._ledger is None:
            return
        own = {"candidate": candidate.name, "stage": candidate.stage}
        if candidate.stopped.endswith("not finite"):
            if candidate.name not in self._dropped:
                self._dropped.add(candidate.name)
                self._ledger.append(event="dropped", **own, reason=candidate.stopped)
            return
        score = candidate.scores[-1]
        self._ledger.append(
            event="epoch",
            **own,
            layer=candidate.layer,
            seed=candidate.seed,
            lr=candidate.recipe.lr,
            l2=candidate.recipe.l2,
            epoch=candidate.epoch,
            norm=candidate.norm(),
            share=candidate.relative_norm(),
            stopped=candidate.stopped,
            baseline=baseline.score,
            **score.to_dict(),
        )

    def trial(self, trial: Any, score: Score, baseline: Score) -> None:
        """A vector of a search without an optimiser has been scored."""
        self._bar.set_description(f"{trial.stage}: layer {trial.layer}")
        if self._ledger is None:
            return
        own = {"candidate": trial.name, "stage": trial.stage}
        if not math.isfinite(score.score):
            self._ledger.append(event="dropped", **own, reason="selection score not finite")
            return
        self._ledger.append(
            event="trial",
            **own,
            layer=trial.layer,
            seed=trial.seed,
            positions=trial.intervention.positions,
            norm=trial.norm(),
            share=trial.share,
            baseline=baseline.score,
            **score.to_dict(),
        )

    def save(self, candidates: Iterable[Resumable]) -> None:
        """An epoch has ended: save what the run can resume from."""
        if self._ledger and self._folder:
            save_state(self._folder, self._settings, self._ledger, candidates)
        self._saved_at = time.monotonic()

    def pause(self, candidates: Iterable[Resumable]) -> None:
        """The same within an epoch, now and then; ends the run if it was asked to end."""
        asked = self._asked()
        if asked or time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save(candidates)
        if asked:
            raise Terminated


# The folder that a training run writes into.

PICTURE = "sweep.png"
PAGE = "training.html"
SEEDS = "seeds"


def check_output(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raise `AFTError` for an output folder that is not empty, unless told to resume or overwrite.

    Even then only a folder that a training run began is accepted, since overwriting empties it.
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
    if not (folder / TRAINING_LEDGER).exists():
        raise AFTError(
            f"The output folder {folder} is not empty, and no training run wrote what is in it.",
            "Choose another folder.",
        )


def digest(documents: object) -> str:
    """SHA-256 of what a run trains on: data, YAML, tokenizer or window may change before it is resumed.

    Args:
        documents: nested tuples, lists, strings and numbers, or dataclasses of them.
    """
    return hashlib.sha256(repr(documents).encode()).hexdigest()


def open_run(
    folder: Path, settings: dict[str, Any], resume: bool, listener: Listener | None = None
) -> tuple[TrainingLedger, dict[str, State]]:
    """The ledger of a new or resumed run, and its candidates' states.

    Args:
        listener: is called with every line of the ledger, of a resumed run also with those that are there.

    Raises:
        AFTError: the run in the folder is finished or had other settings, or nothing can be written.
    """
    check_output(folder, resume=True)
    ledger = TrainingLedger(folder, listener)
    if resume and folder.exists():
        _remove_temporary(folder)
        saved = load_state(folder, settings, ledger)
        if saved is not None:
            if listener:
                for line in ledger.read():
                    listener(line)
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
    """Delete an earlier run. Its vector goes first and its ledger last, so that a crash half-way leaves
    something that is not finished and still known as a run."""
    order = {FILE_NAME: 0, TRAINING_LEDGER: 2}
    for each in sorted(folder.iterdir(), key=lambda path: order.get(path.name, 1)):
        if each.name == LOCK:
            continue
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()


def _remove_temporary(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while it wrote."""
    for each in folder.rglob(".*.tmp"):
        with contextlib.suppress(OSError):
            each.unlink()


def seed_file(folder: Path, seed: int) -> Path:
    """Where a run keeps the finalist of a seed."""
    return folder / SEEDS / f"seed-{seed}.safetensors"


# The append-only ledger of a run, and the state it resumes from.

TRAINING_LEDGER = "training.jsonl"
STATE = "state.safetensors"
State = tuple[dict[str, Tensor], dict[str, Any]]  # as `Candidate.restore` takes it
Listener = Callable[[dict[str, Any]], None]


class TrainingLedger(JsonLines):
    """``training.jsonl`` of a run folder: one line per event, written at once."""

    def __init__(self, folder: Path, listener: Listener | None = None) -> None:
        super().__init__(folder / TRAINING_LEDGER, listener)
        self.lines = 0

    def append(self, **line: Any) -> None:
        """Add one line."""
        super().append(**line)
        self.lines += 1

    def sync(self) -> None:
        """Flush all lines to the disk, so that they survive a loss of power."""
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


def log_training(trackers: Trackers, line: dict[str, Any]) -> None:
    """Log a ledger's line: settings, scores of candidates by epoch or trial, rounds, the choice."""
    event = line["event"]
    if event == "start":
        trackers.settings(line["settings"])
    # A candidate has a curve, over its epochs or over the lengths that were tried of it.
    place = {
        "epoch": line.get("candidate"),
        "trial": str(line.get("candidate")).rpartition("-")[0],
        "round": "rft",
    }.get(event, event)
    if event in ("baseline", "epoch", "trial", "round", "chosen"):
        trackers.log({f"{place}/{name}": value for name, value in line.items() if name not in _IN_NAMES})


# What a candidate's name says of it, and what is the same in all lines.
_IN_NAMES = ("stage", "lr", "l2", "baseline", "n")


def save_state(
    folder: Path, settings: dict[str, Any], ledger: TrainingLedger, candidates: Iterable[Resumable]
) -> None:
    """Write what `load_state` reads, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for candidate in candidates:
        its_tensors, values[candidate.name] = candidate.state()
        tensors |= {f"{candidate.name}/{key}": value.contiguous() for key, value in its_tensors.items()}
    header = {"settings": settings, "lines": ledger.lines, "candidates": values}
    ledger.sync()
    with replacing(folder / STATE) as temporary:
        save_file(tensors, temporary, metadata={"state": canonical_json(header)})


def load_state(folder: Path, settings: dict[str, Any], ledger: TrainingLedger) -> dict[str, State] | None:
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
