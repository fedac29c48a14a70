"""Training every vector of a study into a library, one after the other, resumably."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines

from lm_eval_aft.errors import AFTError
from lm_eval_aft.library import Library
from lm_eval_aft.library.header import FILE_NAME
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.study import Study, StudyEntry
from lm_eval_aft.training.precision import to_training_dtype
from lm_eval_aft.training.prepared import prepare
from lm_eval_aft.training.train import run
from lm_eval_aft.vector import SteeringVector, canonical_json

logger = logging.getLogger(__name__)

# A hidden folder of the library: listings pass it over.
FOLDER = ".train-set"
LEDGER = "ledger.jsonl"
DONE, BEGUN, WAITING = "in the library", "begun", "to do"


@dataclass(frozen=True)
class Standing:
    """How far an entry of a study is: ``state`` is `DONE`, `BEGUN` or `WAITING`."""

    entry: StudyEntry
    state: str


class TrainSet:
    """A study, and the library that it fills.

    Each vector is trained in a hidden folder of the library and moved to its place when it is finished,
    so a run that was killed goes on where it stopped.
    """

    def __init__(
        self, study: Study, library: Library, model: str, model_args: Mapping[str, Any] | None = None
    ) -> None:
        self.study = study
        self.library = library
        self.model = model
        self.model_args = dict(model_args or {})
        self.folder = library.root / FOLDER

    def standings(self) -> list[Standing]:
        """How far every entry is, in the study's order.

        Raises:
            AFTError: the library holds a vector of an entry's name that this study did not train.
        """
        ledger, found = self._ledger(), []
        names = set(self.library.names())
        for entry in self.study.entries:
            state = WAITING
            if entry.name in names:
                self._require_own(entry, ledger.get(entry.name))
                state = DONE
            elif self._work(entry).exists():
                state = BEGUN
            found.append(Standing(entry, state))
        return found

    def check_fresh(self) -> None:
        """Raise `AFTError` if anything of the study is there already: then it wants to be resumed."""
        begun = [each.entry.name for each in self.standings() if each.state != WAITING]
        if begun:
            raise AFTError(
                f"The library {self.library.root} already has, or began, {', '.join(begun)}.",
                "Go on with --resume, or choose another library.",
            )

    def train(self, *, say: Callable[[str], None] = logger.info, progress: bool = True) -> dict[str, str]:
        """Train what is not in the library yet; return why entries failed, by name.

        An entry that cannot be trained (no such data, no training split) does not stop the others.
        """
        failed: dict[str, str] = {}
        lm: AFTLM | None = None
        for standing in self.standings():
            entry = standing.entry
            if standing.state == DONE:
                say(f"{entry.name}: already in the library.")
                continue
            if lm is None:
                lm = AFTLM(self.model, **self.model_args)
                if "dtype" not in self.model_args:
                    to_training_dtype(lm.model)
            say(f"{entry.name}: training on {entry.task} ...")
            started = time.monotonic()
            try:
                self._train(entry, lm, say, progress)
            except AFTError as error:
                failed[entry.name] = f"{error.what} {error.hint or ''}".strip()
                say(f"{entry.name}: not trained. {failed[entry.name]}")
                continue
            say(f"{entry.name}: trained in {time.monotonic() - started:.0f} s.")
        return failed

    def _train(self, entry: StudyEntry, lm: AFTLM, say: Callable[[str], None], progress: bool) -> None:
        work = self._work(entry)
        told = work.with_name(f"{work.name}.asked.json")
        asked = canonical_json(self._asked(entry))
        if work.exists() and not (told.is_file() and told.read_text(encoding="utf-8") == asked):
            say(f"{entry.name}: was begun with other settings, and is begun anew.")
            shutil.rmtree(work)
        if not (work / FILE_NAME).exists():  # finished, if it is there
            prepared = prepare(lm, entry.plan())
            work.parent.mkdir(parents=True, exist_ok=True)
            told.write_text(asked, encoding="utf-8")
            run(prepared, work, resume=True, progress=progress)
        vector = SteeringVector.load(work)
        record = {"name": entry.name, "sha256": vector.digest(), "asked": self._asked(entry)}
        # Before the vector moves: a line too many does no harm, a line too few would disown it.
        self._append(record)
        self.library.add(work, entry.name)
        shutil.rmtree(work, ignore_errors=True)
        told.unlink(missing_ok=True)

    def _append(self, record: dict[str, Any]) -> None:
        """A line of the ledger, below a last one that sudden death may have cut short."""
        path = self.folder / LEDGER
        cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        with path.open("a", encoding="utf-8") as stream:
            stream.write(("\n" if cut else "") + json.dumps(record) + "\n")

    def _work(self, entry: StudyEntry) -> Path:
        return self.folder / "work" / entry.name.replace("/", ",")

    def _asked(self, entry: StudyEntry) -> dict[str, Any]:
        """What the entry's vector depends on, as JSON would give it back."""
        asked: dict[str, Any] = {"model": self.model, **entry.plan().to_dict()}
        # Where it is loaded, and how it is batched, decides nothing.
        loaded = {key: value for key, value in self.model_args.items() if key not in ("device", "batch_size")}
        if loaded:
            asked["model_args"] = loaded
        return dict(json.loads(canonical_json(asked)))

    def _require_own(self, entry: StudyEntry, record: dict[str, Any] | None) -> None:
        there = SteeringVector.load(self.library.path(entry.name)).digest()
        if record is None or record.get("sha256") != there:
            raise AFTError(
                f"The library {self.library.root} has a vector {entry.name!r} that this study did not train.",
                "Remove it, rename the entry, or choose another library.",
            )
        asked = self._asked(entry)
        differing = [
            key for key in sorted({*asked, *record["asked"]}) if asked.get(key) != record["asked"].get(key)
        ]
        if differing:
            raise AFTError(
                f"{entry.name} in the library was trained with other settings ({', '.join(differing)}).",
                f"Remove it with `aft vectors remove {entry.name}`, or choose another library.",
            )

    def _ledger(self) -> dict[str, dict[str, Any]]:
        """The last record of every name; a line cut short by sudden death is passed over."""
        found: dict[str, dict[str, Any]] = {}
        path = self.folder / LEDGER
        if path.exists():
            with jsonlines.open(path) as reader:
                for record in reader.iter(type=dict, skip_invalid=True):
                    found[str(record.get("name"))] = record
        return found
