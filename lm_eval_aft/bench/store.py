"""The folder of a study: finished vectors and scores by their addresses, work in progress, one ledger."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonlines

from lm_eval_aft.alone import LOCK, alone_in
from lm_eval_aft.errors import AFTError
from lm_eval_aft.vector import FILE_NAME

LEDGER = "ledger.jsonl"


class Store:
    """Where a study's results lie.

    ``vectors/KEY``, ``baselines/KEY`` and ``scores/KEY`` are whole or not there: they are made under
    ``work/`` and renamed. The keys are those of `lm_eval_aft.bench.matrix.Cell`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def vector(self, key: str) -> Path:
        """Folder of a finished training run."""
        return self.root / "vectors" / key

    def baseline(self, key: str) -> Path:
        """Folder of a baseline's results."""
        return self.root / "baselines" / key

    def scores(self, key: str) -> Path:
        """Folder of a cell's results."""
        return self.root / "scores" / key

    def work(self, kind: str, key: str) -> Path:
        """Folder in which something is being made."""
        return self.root / "work" / f"{kind}-{key}"

    def trained(self, key: str) -> bool:
        """Whether a vector is finished."""
        return (self.vector(key) / FILE_NAME).is_file()

    @staticmethod
    def settle(made: Path, place: Path) -> None:
        """Move something finished to its place."""
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():  # made twice, by a worker that was given up and was not dead
            shutil.rmtree(made)
            return
        made.rename(place)

    def set_aside(self, place: Path) -> None:
        """Take something damaged out of the way, to ``errors``."""
        aside = self.root / "errors" / f"{place.parent.name}-{place.name}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)

    @contextmanager
    def opened(self, resume: bool) -> Iterator[Ledger]:
        """The study's ledger, for this process alone.

        Raises:
            AFTError: the folder holds a study and ``resume`` is not set, or something else; or another
                process is at it.
        """
        path = self.root / LEDGER
        foreign = self.root.is_dir() and any(each.name != LOCK for each in self.root.iterdir())
        if foreign and not path.exists():
            raise AFTError(
                f"The output folder {self.root} is not empty, and no study wrote what is in it.",
                "Choose another folder.",
            )
        if path.exists() and not resume:
            raise AFTError(
                f"The output folder {self.root} holds a study already.",
                "Go on with --resume (what is finished is kept, also where the study file was changed), or "
                "choose another folder.",
            )
        with alone_in(self.root):
            path.touch()
            yield Ledger(path)


class Ledger:
    """``ledger.jsonl``: one line per finished cell, and what else happened; written by one process."""

    def __init__(self, path: Path, mend: bool = True) -> None:
        self.path = path
        if mend:
            self._mend()
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, dict[str, Any]] = {}
        with jsonlines.open(path) as reader:
            for line in reader.iter(type=dict, skip_invalid=True):
                self._read(line)

    def append(self, **line: Any) -> None:
        """Add one line."""
        with jsonlines.open(self.path, "a") as writer:
            writer.write(line)
        self._read(line)

    def _read(self, line: dict[str, Any]) -> None:
        if line.get("event") == "cell":
            self.outcomes[str(line.get("key"))] = line
            self.failures.pop(str(line.get("key")), None)
        elif line.get("event") == "failed":
            self.failures[str(line.get("key"))] = line

    def _mend(self) -> None:
        """Drop a last line that sudden death cut short: the next one would be glued to it."""
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            with self.path.open("r+b") as stream:
                stream.truncate(data.rfind(b"\n") + 1)
