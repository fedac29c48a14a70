"""Study files: which vectors a library is to hold, or which models, tasks, methods and seeds to cross."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lm_eval_aft._util.config import HINT, Fields, check_field_types, read_yaml
from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.demo import NAME as DEMO
from lm_eval_aft.harness.examples import PROMPTS, PromptSettings
from lm_eval_aft.library.files import check_name
from lm_eval_aft.library.routers import read_table
from lm_eval_aft.studies.published import TABLES
from lm_eval_aft.training.recipe import DEFAULT_PROTOCOL, TrainingPlan, parse_rungs

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
    merged = {"protocol": DEFAULT_PROTOCOL, **defaults, **own}
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


# A study file: models × tasks × methods × seeds, and the recipe they share.

_TOP = (
    *("study", "models", "tasks", "methods", "seeds", "recipe", "evaluation"),
    *("prune", "include_path", "data", "earlier"),
)
_MODEL = ("name", "pretrained", "dtype", "revision", "model_args", *PROMPTS)
# Arguments of ``--model aft`` that steer: in a study the cells do.
_STEERING = ("vector", "coefficient", "positions", "route", "library", "answer_only")
_EVALUATION = ("limit", "batch_size", "placebos")
# Settings of a plan that the matrix itself sets.
_OURS = ("task", "first_seed", "include_path", "prompts")


@dataclass(frozen=True)
class ModelEntry:
    """A model: ``pretrained`` as lm-eval takes it, its arguments, and prompt settings of its own."""

    name: str
    pretrained: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskEntry:
    """A task: its harness name, documents to evaluate on (``None``: all), settings of its own."""

    name: str
    task: str
    limit: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodEntry:
    """A method: a name for any settings of `aft train` (``method``, ``control``, ``lr``, ...)."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchStudy:
    """A whole study.

    Attributes:
        name: what it is called in its report.
        seeds: the seeds of each combination; a cell trains with one of them.
        recipe: settings of `aft train` that all cells share.
        batch_size: of scoring, as lm-eval takes it; it decides how fast, not what comes out.
        placebos: random directions scored beside each vector.
        prune: once a method's first seed was given up after its retries, leave out its other seeds.
        data: folder to work in, where data sets lie that are not on the Hub or not reachable there.
        earlier: which of the earlier study's tables to show beside ours, or ``""``.
    """

    name: str
    models: tuple[ModelEntry, ...]
    tasks: tuple[TaskEntry, ...]
    methods: tuple[MethodEntry, ...]
    seeds: tuple[int, ...] = (0,)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    batch_size: str = "16"
    placebos: int = 0
    prune: bool = False
    include_path: tuple[str, ...] = ()
    data: str | None = None
    earlier: str = ""

    def plan(self, model: ModelEntry, task: TaskEntry, method: MethodEntry, seed: int) -> TrainingPlan:
        """What a cell trains: the recipe, changed by its model, its task and its method, in this order.

        A recipe may ask for several seeds in each cell (``seeds: 3``); cells never share one.
        """
        settings = {
            "protocol": DEFAULT_PROTOCOL,
            **self.recipe,
            **model.settings,
            **task.settings,
            **method.settings,
        }
        prompts = {key: settings.pop(key) for key in PROMPTS if key in settings}
        each = settings.setdefault("seeds", 1)
        asked = PromptSettings(**prompts)
        check_field_types(asked)
        return TrainingPlan.of(
            task.task,
            prompts=asked,
            include_path=self.include_path,
            first_seed=seed * int(each),
            **settings,
        )


def read_bench(path: Path) -> BenchStudy:
    """Read a study file.

    Raises:
        AFTError: it cannot be read, or says something that cannot be; every such field is named.
    """
    fields = Fields(path)
    table = fields.expanded(fields.mapping(read_mapping(path, HINT), "", _TOP), "")
    evaluation = fields.mapping(table.get("evaluation"), "evaluation", _EVALUATION)
    limit = fields.count(evaluation.get("limit"), "evaluation.limit")
    batch_size = evaluation.get("batch_size", 16)
    if not (isinstance(batch_size, int) and batch_size > 0) and not str(batch_size).startswith("auto"):
        fields.fault("evaluation.batch_size", f"wants a number or auto, got {batch_size!r}.")
    study = BenchStudy(
        name=fields.text(table.get("study"), "study", path.stem),
        models=_models(fields, table.get("models"), path.parent),
        tasks=_tasks(fields, table.get("tasks"), limit),
        methods=_methods(fields, table.get("methods", ["static"])),
        seeds=_seeds(fields, table.get("seeds", 1)),
        recipe=_settings(fields, table.get("recipe"), "recipe"),
        batch_size=str(batch_size),
        placebos=fields.count(evaluation.get("placebos"), "evaluation.placebos", 0) or 0,
        prune=fields.flag(table.get("prune"), "prune"),
        include_path=_bench_folders(fields, table.get("include_path"), path.parent),
        data=_data(fields, table.get("data"), path.parent),
        earlier=_earlier(fields, table.get("earlier")),
    )
    _check_plans(fields, study)
    fields.check()
    return study


def _models(fields: Fields, value: Any, base: Path) -> tuple[ModelEntry, ...]:
    found = []
    for i, each in enumerate(fields.items(value, "models")):
        where = f"models[{i}]"
        own = fields.mapping(each, where, _MODEL, head="pretrained")
        pretrained = fields.text(own.get("pretrained"), f"{where}.pretrained")
        if pretrained.startswith(("/", "./", "../")):
            pretrained = str((base / pretrained).resolve())
            if not Path(pretrained).is_dir():
                fields.fault(f"{where}.pretrained", f"there is no folder {pretrained}.")
        arguments = fields.mapping(own.get("model_args"), f"{where}.model_args")
        for key in (key for key in _STEERING if key in arguments):
            fields.fault(f"{where}.model_args.{key}", "a study's cells steer by themselves.")
        arguments |= {key: own[key] for key in ("dtype", "revision") if own.get(key) is not None}
        name = fields.name(own.get("name", pretrained.rstrip("/").rpartition("/")[2]), f"{where}.name")
        prompts = {key: own[key] for key in PROMPTS if key in own}
        found.append(ModelEntry(name, pretrained, arguments, prompts))
    fields.distinct([entry.name for entry in found], "models")
    return tuple(found)


def _tasks(fields: Fields, value: Any, limit: int | None) -> tuple[TaskEntry, ...]:
    found = []
    for i, each in enumerate(fields.items(value, "tasks")):
        where = f"tasks[{i}]"
        own = fields.mapping(each, where, head="task")
        task = fields.text(own.pop("task", None), f"{where}.task")
        if "," in task:
            fields.fault(f"{where}.task", "names several tasks; a cell is trained and scored on one.")
        if task.endswith((".yaml", ".yml")):
            fields.fault(f"{where}.task", "wants the task's name; its folder goes into include_path.")
        name = fields.name(own.pop("name", task), f"{where}.name")
        most = fields.count(own.pop("limit", None), f"{where}.limit") or limit
        found.append(TaskEntry(name, task, most, _settings(fields, own, where)))
    fields.distinct([entry.name for entry in found], "tasks")
    return tuple(found)


def _methods(fields: Fields, value: Any) -> tuple[MethodEntry, ...]:
    found = []
    for i, each in enumerate(fields.items(value, "methods")):
        where = f"methods[{i}]"
        own = fields.mapping(each, where, head="method")
        name = fields.name(own.pop("name", own.get("method")), f"{where}.name")
        found.append(MethodEntry(name, _settings(fields, own, where)))
    fields.distinct([entry.name for entry in found], "methods")
    return tuple(found)


def _settings(fields: Fields, value: Any, where: str) -> dict[str, Any]:
    """Settings of `aft train`, as `TrainingPlan.of` takes them."""
    own = fields.mapping(value, where)
    for key in (key for key in _OURS if key in own):
        fields.fault(f"{where}.{key}", "the matrix sets this itself.")
        del own[key]
    for key, each in own.items():
        with fields.at(f"{where}.{key}"):
            own[key] = parse_rungs(each) if key == "rungs" else setting_value(key, each)
    return own


def _seeds(fields: Fields, value: Any) -> tuple[int, ...]:
    if isinstance(value, list):
        if not value or not all(type(each) is int and each >= 0 for each in value):
            fields.fault("seeds", f"wants a number of seeds or a list of whole numbers, got {value!r}.")
            return (0,)
        fields.distinct([str(each) for each in value], "seeds")
        return tuple(value)
    return tuple(range(fields.count(value, "seeds") or 1))


def _bench_folders(fields: Fields, value: Any, base: Path) -> tuple[str, ...]:
    given: Sequence[Any] = value if isinstance(value, list) else [] if value is None else [value]
    found = []
    for i, each in enumerate(given):
        folder = (base / fields.text(each, f"include_path[{i}]")).resolve()
        if not folder.is_dir():
            fields.fault(f"include_path[{i}]", f"there is no folder {folder}.")
        found.append(str(folder))
    if len(found) > 1:
        fields.fault("include_path", "lm-eval takes one folder.")
    return tuple(found)


def _data(fields: Fields, value: Any, base: Path) -> str | None:
    if value is None:
        return None
    folder = (base / fields.text(value, "data")).resolve()
    if not folder.is_dir():
        fields.fault("data", f"there is no folder {folder}.")
    return str(folder)


def _earlier(fields: Fields, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or value not in TABLES:
        fields.fault("earlier", f"there is no table {value!r}; choose one of: {', '.join(TABLES)}.")
    return str(value)


def _check_plans(fields: Fields, study: BenchStudy) -> None:
    """Every recipe must make a plan; a fault is told where it comes in."""
    if fields.faults:
        return
    model, task, plain = ModelEntry("m", DEMO), TaskEntry("t", "t"), MethodEntry("static")
    with fields.at("recipe"):
        plan = study.plan(model, task, plain, 0)
        if study.prune and not plan.protocol.retries:
            fields.fault("prune", "wants a recipe with retries; after those a pair is given up.")
    if fields.faults:
        return
    for i, each in enumerate(study.models):
        with fields.at(f"models[{i}] ({each.name})"):
            study.plan(each, task, plain, 0)
    for i, one in enumerate(study.tasks):
        with fields.at(f"tasks[{i}] ({one.name})"):
            study.plan(model, one, plain, 0)
    for i, method in enumerate(study.methods):
        with fields.at(f"methods[{i}] ({method.name})"):
            study.plan(model, task, method, 0)
