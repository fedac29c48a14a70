"""A study file: which vectors a library is to hold, and how each is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lm_eval_aft.errors import AFTError
from lm_eval_aft.field_types import check_field_types
from lm_eval_aft.library.names import check_name
from lm_eval_aft.library.route import read_table
from lm_eval_aft.training.examples import PROMPTS, PromptSettings
from lm_eval_aft.training.plan import TrainingPlan
from lm_eval_aft.training.protocols import DEFAULT, parse_rungs
from lm_eval_aft.yaml_files import read_yaml

_SCORES = ("tasks", "limit")
_KEYS = ("model", "include_path", "defaults", "vectors", "unavailable", "scores")
_HINT = "See scripts/studies/library.yaml for an example."
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True)
class StudyEntry:
    """One vector to train.

    Attributes:
        name: where it goes in the library.
        settings: what `TrainingPlan.of` takes besides the task.
        limit: documents of its task in the cross-scores; ``None``: as the study says.
    """

    name: str
    task: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None

    def plan(self) -> TrainingPlan:
        """The training plan; raises `AFTError` on a setting that does not exist or cannot be."""
        try:
            return TrainingPlan.of(self.task, **self.settings)
        except AFTError as error:
            raise AFTError(f"{self.name}: {error.what}", error.hint) from error
        except (TypeError, ValueError) as error:
            raise AFTError(f"{self.name}: a setting makes no sense ({error}).", _HINT) from error


@dataclass(frozen=True)
class Study:
    """A whole study.

    Attributes:
        model: Hub name or folder of the base model, if the file names one.
        unavailable: name -> what would be needed to train it.
        tasks: tasks to score on besides those trained on.
        limit: documents per task in the cross-scores; ``None``: all.
        include_path: folders of task files.
    """

    entries: tuple[StudyEntry, ...]
    model: str | None = None
    unavailable: Mapping[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    include_path: tuple[str, ...] = ()

    def scored_tasks(self) -> dict[str, StudyEntry | None]:
        """Every task of the cross-scores, with the first entry trained on it."""
        found: dict[str, StudyEntry | None] = {}
        for entry in self.entries:
            for task in entry.plan().tasks:
                found.setdefault(task, entry)
        return found | {task: None for task in self.tasks if task not in found}


def read_mapping(path: Path, hint: str) -> dict[Any, Any]:
    """What a study file says, whatever that is.

    Raises:
        AFTError: it cannot be read, is not YAML or not a mapping.
    """
    try:
        table = read_yaml(read_table(path))
    except yaml.YAMLError as error:
        raise AFTError(f"The study {path} is not YAML: {str(error).partition(chr(10))[0]}", hint) from error
    if not isinstance(table, dict):
        raise AFTError(f"The study {path} must be a mapping.", hint)
    return table


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        AFTError: it cannot be read, or says something that cannot be; the place is named.
    """
    table = read_mapping(path, _HINT)
    unknown = [str(key) for key in table if key not in _KEYS]
    if unknown:
        raise AFTError(f"The study {path} has unknown keys: {', '.join(unknown)}.", _HINT)
    parts = {key: table.get(key) or {} for key in ("defaults", "vectors", "unavailable", "scores")}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise AFTError(f"`{key}` of the study {path} must be a mapping.", _HINT)
    include = tuple(map(str, _folders(table.get("include_path"), path)))
    entries = tuple(
        _entry(name, value, parts["defaults"], include) for name, value in parts["vectors"].items()
    )
    if not entries:
        raise AFTError(f"The study {path} names no vectors.", _HINT)
    for entry in entries:
        entry.plan()
    scores = parts["scores"]
    tasks = scores.get("tasks") or []
    if not set(scores) <= set(_SCORES) or not (
        isinstance(tasks, list) and all(isinstance(t, str) for t in tasks)
    ):
        raise AFTError(f"`scores` of the study {path} wants tasks: [NAME, ...] and limit: N.", _HINT)
    return Study(
        entries,
        None if table.get("model") is None else str(table["model"]),
        {check_name(str(name)): str(needs) for name, needs in parts["unavailable"].items()},
        tuple(tasks),
        _count(scores.get("limit"), "scores"),
        include,
    )


def _folders(value: Any, source: Path) -> list[Path]:
    given = [value] if isinstance(value, str) else value or []
    if not (isinstance(given, list) and all(isinstance(each, str) for each in given)):
        raise AFTError(f"`include_path` of the study {source} must be a folder, or a list of them.", _HINT)
    found = [(source.parent / each).resolve() for each in given]
    for each in found:
        if not each.is_dir():
            raise AFTError(f"`include_path` of the study {source}: there is no folder {each}.", _HINT)
    return found


def _entry(name: Any, value: Any, defaults: Mapping[str, Any], include: tuple[str, ...]) -> StudyEntry:
    name = check_name(str(name))
    own = {"task": value} if isinstance(value, str) else value
    if not isinstance(own, dict) or not isinstance(own.get("task"), str):
        raise AFTError(f"{name} of the study names no task.", "Write NAME: TASK, or NAME: {task: TASK, ...}.")
    merged = {"protocol": DEFAULT, **defaults, **own}
    task, limit = merged.pop("task"), _count(merged.pop("limit", None), name)
    prompts = {key: merged.pop(key) for key in PROMPTS if key in merged}
    settings = {
        key: parse_rungs(each) if key == "rungs" else setting_value(key, each) for key, each in merged.items()
    }
    if prompts:
        settings["prompts"] = PromptSettings(**prompts)
        check_field_types(settings["prompts"])
    if include:
        settings["include_path"] = include
    return StudyEntry(name, task, settings, limit)


def setting_value(key: str, value: Any) -> Any:
    """A setting as the plan takes it: YAML reads 1e-3 as text, and a lone layer as a number."""
    if key == "layers":
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, list):
        return tuple(setting_value("", each) for each in value)
    return value


def _count(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AFTError(f"{where}: limit={value!r} is no number of documents.", _HINT)
    return value
