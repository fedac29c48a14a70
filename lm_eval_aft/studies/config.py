"""Study files: which vectors a library is to hold, or which models, tasks, methods and seeds to cross.

Both kinds are YAML and go through `_read_file`: a pydantic model each, every fault named with its place.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.settings import read_yaml
from lm_eval_aft.demo import NAME as DEMO
from lm_eval_aft.harness.examples import PROMPTS, PromptSettings
from lm_eval_aft.harness.model_args import read_model_args, refuse_steering
from lm_eval_aft.harness.tasks import check_names, find_definition, full_index
from lm_eval_aft.library.files import check_name
from lm_eval_aft.library.routers import read_table
from lm_eval_aft.training.recipe import TrainingPlan, parse_rungs

# The earlier study's tables.
EARLIER_STUDY = read_yaml(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# Settings of a plan that the study itself sets.
_SET_BY_STUDY = ("task", "first_seed", "include_path", "prompts")


# Types of fields. What their validators raise is reported with the place of the field.


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Pydantic collects ValueErrors; any other error would end the reading at the first fault."""
    try:
        yield
    except AFTError as error:
        raise ValueError(error.one_line) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"invalid setting ({error}).") from error


def setting_value(key: str, value: Any) -> Any:
    """A setting as the plan takes it: YAML reads 1e-3 as text, and a single layer as a number.

    >>> setting_value("lr", ["1e-3", 0.01]), setting_value("layers", 3)
    ((0.001, 0.01), '3')
    """
    if key == "layers":
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, list):
        return tuple(setting_value("", each) for each in value)
    return value


def _training_settings(given: dict[str, Any]) -> dict[str, Any]:
    with _as_value_error():
        settings = {key: setting_value(key, value) for key, value in given.items()}
        return settings | ({"rungs": parse_rungs(given["rungs"])} if "rungs" in given else {})


def _without(keys: Sequence[str], why: str) -> AfterValidator:
    def check(given: dict[str, Any]) -> dict[str, Any]:
        if found := [key for key in keys if key in given]:
            raise ValueError(f"remove {' and '.join(found)}: {why}.")
        return given

    return AfterValidator(check)


def _check_model_args(given: dict[str, Any]) -> dict[str, Any]:
    with _as_value_error():
        refuse_steering(given, "a study's cells steer by themselves")
        return read_model_args(given)


def _check_task(task: str) -> str:
    if "," in task:
        raise ValueError("names several tasks; a cell is trained and scored on one.")
    if task.endswith((".yaml", ".yml")):
        raise ValueError("must be the task's name; its folder goes into include_path.")
    return task


def _check_vector_name(name: Any) -> str:
    with _as_value_error():
        return check_name(str(name))


def _distinct(entries: list[Any]) -> list[Any]:
    names = [getattr(each, "name", each) for each in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{str(name)!r} occurs twice; give each its own name:.")
    return entries


def _folder(text: str, info: ValidationInfo) -> str:
    """A folder, given relative to the study file."""
    folder = Path((info.context or {})["base"], text).resolve()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}.")
    return str(folder)


def _check_pretrained(text: str, info: ValidationInfo) -> str:
    if not text.startswith(("/", "./", "../")):
        return text
    file = Path((info.context or {})["base"], text).resolve()
    return str(file) if file.suffix == ".gguf" and file.is_file() else _folder(text, info)


def _check_table(name: str) -> str:
    if name not in EARLIER_STUDY:
        raise ValueError(f"there is no table {name!r}; choose one of: {', '.join(EARLIER_STUDY)}.")
    return name


def _check_batch_size(value: Any) -> str:
    if not (type(value) is int and value > 0) and not str(value).startswith("auto"):
        raise ValueError(f"must be a positive number or auto, got {value!r}.")
    return str(value)


MOST_SEEDS = 10_000  # a larger number is a slip


def _listed_seeds(value: Any) -> Any:
    """The seeds from their number; a list stays."""
    if type(value) is int and value < 1:
        raise ValueError(f"must be a whole number of at least 1, or a list of seeds, got {value}.")
    if type(value) is int and value > MOST_SEEDS:
        raise ValueError(f"must be {MOST_SEEDS:,} at most, or a list of seeds.")
    return list(range(value)) if type(value) is int else value


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


_T = TypeVar("_T")
_Text = Annotated[str, Field(min_length=1)]
_EntryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@+=%,-]{0,95}$")]
_Count = Annotated[int, Field(ge=1)]
_Settings = Annotated[dict[str, Any], AfterValidator(_training_settings)]
_CellSettings = Annotated[_Settings, _without(_SET_BY_STUDY, "the study itself sets this")]
_ModelArgs = Annotated[
    dict[str, Any],
    _without(("pretrained", "batch_size"), "it is a field of the model or of the evaluation"),
    AfterValidator(_check_model_args),
]
_VectorName = Annotated[str, BeforeValidator(_check_vector_name)]
_Several = Annotated[list[_T], Field(min_length=1), AfterValidator(_distinct)]
_Folder = Annotated[_Text, AfterValidator(_folder)]
_Folders = Annotated[tuple[_Folder, ...], BeforeValidator(_listed)]


class _Strict(BaseModel):
    """No conversion of types and no unknown fields; an empty field of a file has its default."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        optional = {name for name, each in cls.model_fields.items() if each.default is None}
        return {key: value for key, value in given.items() if value is not None or key in optional}


def _flat(model: type[BaseModel], head: str, named: bool = True) -> BeforeValidator:
    """An entry as a file has it: text stands for ``{head: text}``, and ``settings`` are not nested.

    With ``named``, ``head`` also names the entry where it has no ``name`` of its own.
    """
    fields = set(model.model_fields) - {"settings", *(() if named else ("name",))}

    def nest(given: Any) -> Any:
        given = {head: given} if isinstance(given, str) else given
        if not isinstance(given, dict):
            return given
        own = {key: value for key, value in given.items() if key in fields}
        rest = {key: value for key, value in given.items() if key not in fields}
        if named and isinstance(given.get(head), str):
            own.setdefault("name", given[head].rstrip("/").rpartition("/")[2])
        return own | ({"settings": rest} if "settings" in model.model_fields else rest)

    return BeforeValidator(nest)


class ModelEntry(_Strict):
    """A model: ``pretrained`` as lm-eval takes it, its arguments, and prompt settings of its own."""

    name: _EntryName
    pretrained: Annotated[_Text, AfterValidator(_check_pretrained)]
    dtype: str | None = None
    revision: str | None = None
    given_args: _ModelArgs = Field(default={}, alias="model_args")
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None

    @cached_property
    def model_args(self) -> dict[str, Any]:
        """Arguments of ``--model aft``."""
        own = {"dtype": self.dtype, "revision": self.revision}
        return self.given_args | {key: value for key, value in own.items() if value is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """The prompt settings that the file gives."""
        return {key: getattr(self, key) for key in PROMPTS if key in self.model_fields_set}


class TaskEntry(_Strict):
    """A task: its harness name, documents to evaluate on (``None``: all), settings of its own."""

    name: _EntryName
    task: Annotated[_Text, AfterValidator(_check_task)]
    limit: _Count | None = None
    settings: _CellSettings = {}


class MethodEntry(_Strict):
    """A method: a name for any settings of `aft train` (``method``, ``control``, ``lr``, ...)."""

    name: _EntryName
    settings: _CellSettings = {}


class Evaluation(_Strict):
    """How cells are scored.

    Attributes:
        batch_size: as lm-eval takes it; it changes the speed, not the scores.
    """

    limit: _Count | None = None  # documents of tasks that name no limit of their own; ``None``: all
    batch_size: Annotated[str, BeforeValidator(_check_batch_size)] = "16"
    placebos: Annotated[int, Field(ge=0)] = 0  # random directions scored beside each vector


class BenchStudy(_Strict):
    """Models × tasks × methods × seeds, and the recipe they share.

    Attributes:
        seeds: the seeds of each combination; a cell trains with one of them.
        prune: once a method's first seed was given up after its retries, leave out its other seeds.
        data: folder to work in, where data sets lie that are not on the Hub or not reachable there.
        earlier: which of the earlier study's tables to show beside ours, or ``""``.
    """

    name: _Text = Field(alias="study")  # what it is called in its report
    models: _Several[Annotated[ModelEntry, _flat(ModelEntry, "pretrained")]]
    tasks: _Several[Annotated[TaskEntry, _flat(TaskEntry, "task")]]
    methods: _Several[Annotated[MethodEntry, _flat(MethodEntry, "method")]] = Field(
        default=["static"], validate_default=True
    )
    seeds: Annotated[_Several[Annotated[int, Field(ge=0)]], BeforeValidator(_listed_seeds)] = [0]
    recipe: _CellSettings = {}  # settings of `aft train` that all cells share
    evaluation: Evaluation = Evaluation()
    prune: bool = False
    include_path: Annotated[_Folders, Field(max_length=1)] = ()
    data: _Folder | None = None
    earlier: Annotated[str, AfterValidator(_check_table)] = ""

    def plan(self, model: ModelEntry, task: TaskEntry, method: MethodEntry, seed: int) -> TrainingPlan:
        """What a cell trains: the recipe, changed by its model, its task and its method, in this order.

        A recipe may ask for several seeds in each cell (``seeds: 3``); cells never share one.
        """
        settings = dict(self.recipe)
        for entry in (model, task, method):
            settings |= entry.settings
        prompts = _take_prompts(settings)
        first = seed * int(settings.setdefault("seeds", 1))
        return TrainingPlan.of(
            task.task, prompts=prompts, include_path=self.include_path, first_seed=first, **settings
        )


def require_plain(names: Sequence[str], include_path: Sequence[str | Path] = ()) -> None:
    """Raise `AFTError` unless every name is that of one task: of no file, pattern, group, tag or list."""
    for name in names:
        if name.endswith((".yaml", ".yml")) or "/" in name or "," in name:
            several = "several tasks" if "," in name else "a file"
            raise AFTError(
                f"{name!r} names {several}; what is trained and scored here is one task, by its name.",
                "Name the tasks one by one, and give the folder of their files as include_path.",
            )
    if not (unknown := [name for name in names if find_definition(name, include_path) is None]):
        return
    manager = full_index(include_path)
    check_names(unknown, manager)
    for name in unknown:
        members = manager.match_tasks([name])
        if members == [name]:
            members = [each for each, entry in manager.task_index.items() if name in entry.tags]
            listed = (manager.task_index[name].cfg or {}).get("task")
            members += [each for each in listed if isinstance(each, str)] if isinstance(listed, list) else []
        told = ", ".join(members[:10]) + (", ..." if len(members) > 10 else "")
        raise AFTError(
            f"{name!r} is no plain task: it is a pattern, a group or a tag{f' ({told})' if told else ''}, or "
            "defined inside a group's file.",
            "What is trained and scored here is one plain task: name its members one by one.",
        )


def _take_prompts(settings: dict[str, Any]) -> PromptSettings:
    """Remove the prompt settings and return them."""
    return PromptSettings(**{key: settings.pop(key) for key in PROMPTS if key in settings})


def read_bench_study(path: Path) -> BenchStudy:
    """Read a study of models × tasks × methods × seeds.

    Raises:
        AFTError: it cannot be read, or says something that cannot be; every such field is named.
    """
    study = _read_file(path, BenchStudy, "scripts/studies/local.yaml shows every field.", study=path.stem)
    limit = study.evaluation.limit
    tasks = [each.model_copy(update={"limit": each.limit or limit}) for each in study.tasks]
    study = study.model_copy(update={"tasks": tasks})
    faults = _Faults(path, "scripts/studies/local.yaml shows every field.")
    task, static = TaskEntry(name="t", task="t"), MethodEntry(name="static")
    model = ModelEntry(name="m", pretrained=DEMO)
    plan = faults.check("recipe", lambda: study.plan(model, task, static, 0))
    if plan and study.prune and not (plan.protocol.retries or plan.protocol.one_pass):
        faults.add("prune", "needs a recipe with retries or one backward pass, after which it gives up.")
    faults.refuse()
    usual: dict[str, Any] = {"model": model, "task": task, "method": static, "seed": 0}
    for part in ("model", "task", "method"):
        for i, each in enumerate(getattr(study, f"{part}s")):
            faults.check(f"{part}s[{i}] ({each.name})", partial(study.plan, **usual | {part: each}))
    faults.refuse()
    return study


# A library's study: one vector an entry.


class VectorDefaults(_Strict):
    """What a vector's entry may say, and all entries may share."""

    limit: _Count | None = None  # documents of its task in the cross-scores; ``None``: as ``scores`` says
    settings: _Settings = {}  # what `TrainingPlan.of` takes besides the task, and prompt settings


class VectorEntry(VectorDefaults):
    """One vector to train; ``name`` is where it goes in the library."""

    name: str = ""
    task: str

    def plan(self) -> TrainingPlan:
        """The training plan; raises `AFTError` on a setting that does not exist or cannot be."""
        settings = dict(self.settings)
        settings.setdefault("prompts", _take_prompts(settings))
        try:
            return TrainingPlan.of(self.task, **settings)
        except AFTError as error:
            raise AFTError(f"{self.name}: {error.what}", error.hint) from error
        except (TypeError, ValueError) as error:
            raise AFTError(f"{self.name}: invalid setting ({error}).", _LIBRARY_HINT) from error


class CrossScores(_Strict):
    """What vectors are scored on: ``tasks`` besides those trained on, ``limit`` documents of each."""

    tasks: list[str] = []
    limit: _Count | None = None


class LibraryStudy(_Strict):
    """Every vector that a library is to hold.

    Attributes:
        model: Hub name or folder of the base model, if the file names one.
        unavailable: name -> what would be needed to train it.
    """

    vectors: Annotated[
        dict[_VectorName, Annotated[VectorEntry, _flat(VectorEntry, "task", named=False)]],
        Field(min_length=1),
    ]
    defaults: Annotated[VectorDefaults, _flat(VectorDefaults, "", named=False)] = VectorDefaults()
    model: Annotated[str, BeforeValidator(str)] | None = None
    unavailable: dict[_VectorName, Annotated[str, BeforeValidator(str)]] = {}
    scores: CrossScores = CrossScores()
    include_path: _Folders = ()  # folders of task files

    @property
    def entries(self) -> list[VectorEntry]:
        """The vectors, in the file's order."""
        return list(self.vectors.values())

    def scored_tasks(self) -> dict[str, VectorEntry | None]:
        """Every task of the cross-scores, with the first entry trained on it."""
        found: dict[str, VectorEntry | None] = {}
        for entry in self.entries:
            for task in entry.plan().tasks:
                found.setdefault(task, entry)
        return found | {task: None for task in self.scores.tasks if task not in found}


_LIBRARY_HINT = "See scripts/studies/library.yaml for an example."


def read_library_study(path: Path) -> LibraryStudy:
    """Read a study of a library's vectors; what its entries share is put into each.

    Raises:
        AFTError: it cannot be read, or says something that cannot be; every such field is named.
    """
    study = _read_file(path, LibraryStudy, _LIBRARY_HINT)
    shared = dict(study.defaults.settings)
    shared.pop("task", None)  # each entry has its own
    own = {"include_path": study.include_path} if study.include_path else {}
    faults, entries = _Faults(path, _LIBRARY_HINT), {}
    for name, entry in study.vectors.items():
        limit = entry.limit or study.defaults.limit
        changes = {"name": name, "limit": limit, "settings": {**shared, **entry.settings, **own}}
        entries[name] = entry.model_copy(update=changes)
        faults.check("vectors", entries[name].plan)
    faults.refuse()
    return study.model_copy(update={"vectors": entries})


# Reading.


class _Faults:
    """Gathers what is wrong with a file, to be told at once."""

    def __init__(self, source: Path, hint: str) -> None:
        self.source, self.hint = source, hint
        self.told: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.told.append(f"{where}: {what}")

    def check(self, where: str, make: Callable[[], _T]) -> _T | None:
        """What ``make`` returns; its error is a fault of this place, and then the answer is ``None``."""
        try:
            with _as_value_error():
                return make()
        except ValueError as error:
            self.add(where, str(error))
            return None

    def refuse(self) -> None:
        """Raise `AFTError` if anything was wrong."""
        if len(self.told) == 1:
            raise AFTError(f"The study {self.source} cannot be used: {self.told[0]}", self.hint)
        if self.told:
            lines = "".join(f"\n  {each}" for each in self.told)
            raise AFTError(f"The study {self.source} has {len(self.told)} faults:{lines}", self.hint)


_Model = TypeVar("_Model", bound=BaseModel)


def _read_file(path: Path, model: type[_Model], hint: str, **defaults: Any) -> _Model:
    """A study file as a pydantic model, with environment variables filled in.

    Raises:
        AFTError: it cannot be read, is not YAML or no such study; every fault is named with its place.
    """
    try:
        table = read_yaml(read_table(path))
    except yaml.YAMLError as error:
        raise AFTError(f"The study {path} is not YAML: {str(error).partition(chr(10))[0]}", hint) from error
    if not isinstance(table, dict):
        raise AFTError(f"The study {path} must be a mapping.", hint)
    faults = _Faults(path, hint)
    filled = _fill_variables(table, "", faults)
    filled |= {key: value for key, value in defaults.items() if filled.get(key) is None}
    study: _Model | None = None
    try:
        study = model.model_validate(filled, context={"base": path.parent})
    except ValidationError as error:
        for each in error.errors():
            faults.add(_place(each["loc"]), _fault(each, model))
    faults.refuse()
    assert study is not None
    return study


def _fill_variables(value: Any, where: str, faults: _Faults) -> Any:
    """The value with every ``${VARIABLE}`` in its texts replaced from the environment."""
    if isinstance(value, dict):
        return {
            key: _fill_variables(each, f"{where}.{key}".strip("."), faults) for key, each in value.items()
        }
    if isinstance(value, list):
        return [_fill_variables(each, f"{where}[{i}]", faults) for i, each in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if name not in os.environ:
            faults.add(where, f"the environment has no variable {name}.")
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], ""), value)


def _place(loc: tuple[int | str, ...]) -> str:
    """``models[0].name`` of ("models", 0, "name"); settings are written flat, so that word is left out."""
    parts = (f"[{each}]" if isinstance(each, int) else f".{each}" for each in loc if each != "settings")
    return "".join(parts).lstrip(".")


_WORDS = {
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "cannot be a name (letters, digits and _ - . only; give a name:)",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def _fault(error: Any, model: type[BaseModel]) -> str:
    """One of pydantic's errors in words of this package."""
    kind = error["type"]
    if kind == "missing":
        return "is missing."
    if kind == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
        return f"there is no such field; {meant}"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "too_short":
        return "must have at least one entry."
    told = _WORDS.get(kind) or error["msg"].replace("Input should", "must")
    return f"{told.replace('greater than or equal to', 'at least')}, got {repr(error['input'])[:80]}."


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that a file may have at a place."""
    for part in loc:
        named = {each.alias or name: each.annotation for name, each in model.model_fields.items()}
        if part in named:
            model = next(_models_in(named[str(part)]), model)
    return [each.alias or name for name, each in model.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for each in get_args(annotation):
        yield from _models_in(each)
