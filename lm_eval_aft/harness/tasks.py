"""lm-eval's tasks: finding their definitions, loading one, and scoring without questions."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import logging
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.private_names import borrowed, require
from lm_eval_aft.harness.output_types import OUTPUT_TYPES

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

logger = logging.getLogger(__name__)
_MANAGER = "lm-eval: TaskManager (task_index, all_tasks, all_subtasks, match_tasks, load)"
NOT_TEXT = ("image", "audio")  # a task that has doc_to_image or doc_to_audio is not text only


def tasks_path() -> Path:
    """Folder of the task YAMLs this project ships (to pass to ``lm_eval --include_path``)."""
    package = Path(__file__).parents[1]
    shipped = package / "tasks"
    return shipped if shipped.is_dir() else package.parent / "tasks"


def task_folders(include_path: Sequence[str | Path] = ()) -> list[Path]:
    """All folders searched for tasks: the user's first, then ours, then lm-eval's."""
    import lm_eval.tasks

    for path in include_path:
        if not Path(path).exists():
            raise AFTError(f"No such task folder: {path}.", "Check --include-path.")
    return [*map(Path, include_path), tasks_path(), Path(lm_eval.tasks.__file__).parent]


def find_tasks(
    specs: Sequence[str], include_path: Sequence[str | Path] = (), metadata: Mapping[str, Any] | None = None
) -> tuple[TaskManager, list[str]]:
    """What ``lm_eval --tasks`` makes of names, patterns, groups, tags, YAML files and folders of these.

    Args:
        specs: each entry may be several, comma-separated.
        include_path: folders with tasks of the user's own.
        metadata: what lm-eval hands to tasks that build their documents for a model: the model's name as
            ``pretrained``, its arguments, and ``--metadata``.

    Returns:
        The task manager, and what its ``load`` takes: names and paths of YAML files, each once.

    Raises:
        AFTError: something that is none of these; the nearest names are listed.
    """
    words = [word.strip() for spec in specs for word in str(spec).split(",") if word.strip()]
    if not words:
        raise AFTError("No task was named.", "`aft tasks` lists them.")
    named = [word for word in words if not _is_file(word) and not (os.sep in word and _is_folder(word))]
    files = {word: _task_files(word) for word in words if word not in named}
    manager = task_manager_for(named, include_path, metadata)
    for word in named:  # a registered task goes before a folder that is called like it
        if not manager.match_tasks([word]) and _is_folder(word):
            files[word] = _task_files(word)
    # lm-eval takes groups by name only, and their members may be anywhere.
    if groups := [path.parent for found in files.values() for path, group in found.items() if group]:
        manager = full_index([*include_path, *groups], metadata)
    check_names([word for word in named if word not in files], manager)
    found = [
        [group or str(path) for path, group in files[word].items()]
        if word in files
        else manager.match_tasks([word])
        for word in words
    ]
    return manager, list(dict.fromkeys(chain.from_iterable(found)))


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _is_folder(word: str) -> bool:
    return os.path.isdir(word)  # noqa: PTH112 - Path.is_dir raises where a word is too long to be a path


def _task_files(place: str) -> dict[Path, str | None]:
    """The files that define tasks or groups (with its name): one file, those of a pattern, or in a folder."""
    path = Path(place).absolute()
    pattern = path if _is_file(place) else path / "*.yaml"
    try:
        one = [path] if path.is_file() else []
        paths = one or sorted(Path(path.anchor).glob(str(pattern.relative_to(path.anchor))))
        read = {path: read_definition(path) for path in paths if path.is_file()}
    except Exception as error:  # YAML can be wrong in any way
        raise AFTError(f"A task file of {place} cannot be read: {_first_line(error)}", "Check it.") from error
    found = {path: config.get("group") for path, config in read.items() if config.keys() & {"task", "group"}}
    if not found:
        raise AFTError(f"There is no task file {place}.", "Give the path of a harness task YAML.")
    return found


def load_tasks(manager: TaskManager, names: Sequence[str]) -> Any:
    """Tasks and groups with their data: what ``manager.load`` gives of what `find_tasks` found.

    Raises:
        AFTError: one is named twice, by itself and in a group, or cannot be loaded.
    """
    try:
        return manager.load(list(names))
    except Exception as error:  # the code of a task may raise anything
        raise _not_loaded(" or ".join(map(repr, names)), error) from error


def _not_loaded(name: str, error: Exception) -> AFTError:
    """The error to raise where lm-eval could not load a task."""
    import lm_eval.tasks

    told, stock = _first_line(error), Path(lm_eval.tasks.__file__).parent
    harness = stock.parent
    if isinstance(error, ImportError):
        return AFTError(
            f"The code of task {name} cannot be imported: {told}.",
            "Install the package it needs, or an older version of it if a part is gone.",
        )
    if "uplicate task" in told:
        return AFTError(f"A task is named twice: {told}", "Name it once.")
    if "must have valid or test docs" in told:
        return AFTError(
            f"Task {name} has no evaluation split.",
            "Name one in its YAML, as test_split or validation_split.",
        )
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    last = max((i for i, file in enumerate(files) if file.is_relative_to(harness)), default=-1)
    libraries = (harness.parent, Path(os.__file__).parent)
    own = any(file.is_relative_to(stock) and file.parent != stock for file in files)
    if own or any(not any(map(file.is_relative_to, libraries)) for file in files[last + 1 :][:1]):
        return AFTError(
            f"The code of task {name} fails: {type(error).__name__}: {told}",
            "If it builds its documents for a model, it reads the model arguments and --metadata.",
        )
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
        told = _first_line(error.__cause__)  # the error itself says only that there was one
    if isinstance(error, OSError) or type(error).__module__.startswith("datasets."):
        return AFTError(
            f"The data of task {name} cannot be loaded: {told}",
            "Check the network, or run where the data set's folder is (offline, lm-eval finds "
            "a folder named like the data set in the working directory).",
        )
    return AFTError(
        f"Task {name} cannot be loaded: {type(error).__name__}: {told}",
        "Check its YAML, and the name and configuration of its data set.",
    )


def load_task(name: str, include_path: Sequence[str | Path] = ()) -> ConfigurableTask:
    """The one task that a name or the path of a YAML file stands for.

    Raises:
        AFTError: as `find_tasks` and `load_tasks`, or ``name`` stands for several tasks.
    """
    found = load_tasks(*find_tasks([name], include_path))["tasks"]
    if len(found) != 1:
        raise AFTError(
            f"{name!r} stands for several tasks.", f"Choose one of: {', '.join(list(found)[:20])}."
        )
    return next(iter(found.values()))


@contextmanager
def compiled_once() -> Iterator[None]:
    """In this context lm-eval compiles each prompt template once, not once for every document.

    Over a large task that saves most of the time.
    """
    try:
        from lm_eval.utils import env

        compile_template = env.from_string
    except (ImportError, AttributeError):  # lm-eval keeps it elsewhere: slower
        yield
        return
    env.from_string = cache(compile_template)
    try:
        yield
    finally:
        env.from_string = compile_template


@contextmanager
def environment_asked_once(known: list[str]) -> Iterator[None]:
    """In this context lm-eval collects the description of the machine once, not for every run.

    It lists installed packages, which takes a second. ``known`` keeps it for later contexts.
    """
    from torch.utils import collect_env

    ask = getattr(collect_env, "get_pretty_env_info", None)
    if ask is None:
        yield
        return

    def description() -> str:
        if not known:
            known.append(str(ask()))
        return known[0]

    collect_env.get_pretty_env_info = description
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = ask


def check_names(names: Sequence[str], manager: TaskManager) -> None:
    """Raise `AFTError` with the nearest names for a task the manager does not know."""
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            raise AFTError(
                f"There is no harness task {name!r}.",
                f"Nearest names: {', '.join(near)}." if near else "`aft tasks` lists them all.",
            )


def task_manager_for(
    names: Sequence[str], include_path: Sequence[str | Path] = (), metadata: Mapping[str, Any] | None = None
) -> TaskManager:
    """A ``TaskManager`` that knows the named tasks, restricted to their folders where possible.

    lm-eval's own ``TaskManager()`` parses some 14,000 files, 6 to 11 seconds; a text search finds
    the files that define plain tasks in under one. Groups, tags and patterns take the full index.
    ``metadata`` goes to tasks that build their documents for a model.
    """
    from lm_eval.tasks import TaskManager

    require(_MANAGER)
    definitions = [find_definition(name, include_path) for name in names]
    if None not in definitions:
        # Earlier folders win in task_folders, later ones in TaskManager.
        folders = list(dict.fromkeys(str(path.parent) for path in definitions if path))
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=dict(metadata or {}))
        if all(name in manager.all_tasks for name in names):
            return manager
    return full_index(include_path, metadata)


def full_index(
    include_path: Sequence[str | Path] = (), metadata: Mapping[str, Any] | None = None
) -> TaskManager:
    """The index of every known task, ours and the user's included (6 to 11 seconds)."""
    from lm_eval.tasks import TaskManager

    require(_MANAGER)
    logger.info("Indexing all harness tasks ...")
    # Later paths override earlier ones, so the user's come last.
    return TaskManager(
        include_path=[str(tasks_path()), *map(str, include_path)], metadata=dict(metadata or {})
    )


@dataclass(frozen=True)
class TaskListing:
    """A task as its YAML describes it, no data loaded.

    ``trainable``: it has a training split other than its evaluation split, an output type that can be
    trained on, text only, and options of which not all are right.
    """

    name: str
    output_type: str
    training_split: str | None
    evaluation_split: str | None
    metrics: tuple[str, ...]
    text_only: bool = True

    @property
    def trainable(self) -> bool:
        """Whether train-vector can train on it."""
        apart = self.evaluation_split and self.training_split not in (None, self.evaluation_split)
        kind = OUTPUT_TYPES.get(self.output_type)
        return bool(apart) and self.text_only and kind is not None and kind.trainable(set(self.metrics))


def list_tasks(
    pattern: str = "*", include_path: Sequence[str | Path] = (), manager: TaskManager | None = None
) -> list[TaskListing]:
    """Tasks whose names match, in alphabetical order; of ``manager``, by default of the full index."""
    if manager is None:  # a plain name is found without the full index
        plain = not set(pattern) & set("*?[")
        manager = task_manager_for([pattern], include_path) if plain else full_index(include_path)
    listings = []
    for name in fnmatch.filter(manager.all_subtasks, pattern):
        path = manager.task_index[name].yaml_path
        config = read_definition(path) if path else {}
        metrics = tuple(str(m.get("metric")) for m in config.get("metric_list") or [] if isinstance(m, dict))
        usual = "python" if config.get("class") or not path else "generate_until"
        listings.append(
            TaskListing(
                name,
                str(config.get("output_type", usual)),
                config.get("training_split"),
                config.get("test_split") or config.get("validation_split"),
                metrics,
                not any(config.get(f"doc_to_{kind}") for kind in NOT_TEXT),
            )
        )
    return listings


def read_definition(path: Path) -> dict[str, Any]:
    """A task's YAML with its includes, as lm-eval reads it; functions that it names are not imported."""
    with borrowed("lm-eval: lm_eval.tasks._yaml_loader.load_yaml"):
        from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, Any] = load_yaml(path, resolve_func=False, recursive=True)
    return found


def find_definition(name: str, include_path: Sequence[str | Path] = ()) -> Path | None:
    """The file that defines a plain task, by a text search; ``None`` where there is none."""
    *folders, stock = task_folders(include_path)
    for folder in folders:
        if (path := _search(folder, name)) is not None:
            return path
    return _search_stock(stock, name)


def _search(folder: Path, name: str) -> Path | None:
    pattern = re.compile(rf"^task:\s*['\"]?{re.escape(name)}['\"]?\s*(#.*)?$", re.MULTILINE)
    for path in sorted(folder.rglob("*.yaml")):
        try:
            if pattern.search(path.read_text(encoding="utf-8")):
                return path
        except (OSError, UnicodeDecodeError):
            continue
    return None


# The harness's own thousands of files do not change while we run.
_search_stock = cache(_search)


def set_num_fewshot(task: ConfigurableTask, num_fewshot: int | None) -> int:
    """Set and return the task's number of few-shot examples by lm-eval's own rule.

    The user's number wins unless the task's config fixes 0; without either it is 0.
    """
    configured = task.get_config("num_fewshot")
    if num_fewshot is not None and configured != 0:
        configured = num_fewshot
    task.set_config(key="num_fewshot", value=configured or 0)
    return int(configured or 0)


def evaluation_split(task: ConfigurableTask) -> str:
    """Name of the split lm-eval scores: the test split, else the validation split."""
    return str(task.config.test_split if task.has_test_docs() else task.config.validation_split)


def split_documents(task: ConfigurableTask, split: str) -> list[dict[str, Any]]:
    """All documents of a named split, processed as the task processes them.

    Raises:
        AFTError: the data set has no such split.
    """
    if split not in task.dataset:
        raise AFTError(
            f"Task {task.config.task!r} has no split {split!r}.",
            f"Its data has: {', '.join(map(str, task.dataset))}.",
        )
    documents = task.dataset[split]
    if task.config.process_docs is not None:
        documents = task.config.process_docs(documents)
    return list(documents)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# The answer-only diagnostic: how a model scores the answers when the questions are removed.


def without_contexts(requests: Sequence[Instance]) -> list[Instance]:
    """Copies of log-likelihood requests, with empty contexts.

    lm-eval scores an empty context after the model's prefix token. White space at a context's end
    is dropped with it, although lm-eval would have moved it to the continuation.
    """
    found = []
    for request in requests:
        bare = copy.copy(request)
        bare.arguments = ("", *request.args[1:])
        found.append(bare)
    return found


def refuse_generation(requests: Sequence[Instance]) -> None:
    """Raise `AFTError` if there is anything to generate."""
    if requests:
        task = requests[0].task_name or "the task"
        raise AFTError(
            f"answer_only=true cannot generate, as {task} asks: without its question there is nothing to "
            "answer.",
            "Leave out generation tasks, or answer_only.",
        )


def refuse_thinking(lm: HFLM, names: Iterable[str | None]) -> None:
    """Raise `AFTError` if ``lm`` is to think before it answers: lm-eval does not score given answers then."""
    if lm.enable_thinking:
        raise AFTError(
            f"enable_thinking=true is for tasks that generate, and {', '.join(sorted(filter(None, names)))} "
            "scores given answers.",
            "Leave enable_thinking out, or choose a task that generates.",
        )


def scorable(tasks: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Which tasks can be scored without their questions, and why the others cannot.

    Args:
        tasks: name -> task, as lm-eval's ``TaskManager.load`` gives them.
    """
    kept, out = [], {}
    for name, task in tasks.items():
        kind = OUTPUT_TYPES.get(task.OUTPUT_TYPE)
        if kind is None:
            out[name] = "its requests have no context to remove"
        elif kind.not_alone:
            out[name] = kind.not_alone
        elif getattr(task, "multiple_input", 0):
            out[name] = "its options are in the contexts, so nothing would be left to distinguish them"
        else:
            kept.append(name)
    return kept, out


def require_scorable(tasks: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """As `scorable`; raises `AFTError` when no task is left."""
    kept, out = scorable(tasks)
    if not kept:
        reasons = "; ".join(f"{name}: {why}" for name, why in out.items())
        raise AFTError(
            f"No task can be scored without its questions ({reasons}).",
            "Leave out --answer-only, or add a multiple-choice task.",
        )
    return kept, out
