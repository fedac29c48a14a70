"""Digests of models and tasks by their contents, so that changed files are noticed under the same name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval_aft._util.files import canonical_json
from lm_eval_aft._util.model_source import model_source
from lm_eval_aft.demo import resolve_pretrained
from lm_eval_aft.harness.tasks import find_definition, read_definition
from lm_eval_aft.steering.vector_file import FILE_NAME

# Folders with one of these files are results of this package, not a part of a task.
_OURS = ("ledger.jsonl", FILE_NAME)


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that name a JSON-serialisable value."""
    return hashlib.sha256(canonical_json({"": value}).encode()).hexdigest()[:16]


def model_identity(pretrained: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """A folder by its contents, a Hub model by its name, with the arguments it is loaded with.

    An argument that names a folder (``peft``, ``tokenizer``) counts with what is in it.
    """
    pretrained, model_args = model_source(pretrained, model_args)
    path = Path(resolve_pretrained(pretrained))
    what = _contents(path) if path.is_dir() else pretrained
    found = {"model": what, "args": json.loads(canonical_json(dict(model_args)))}
    named = {key: Path(value) for key, value in model_args.items() if isinstance(value, str) and value}
    if folders := {key: _contents(place) for key, place in named.items() if place.is_dir()}:
        found["folders"] = folders
    return found


def task_identity(name: str, include_path: Sequence[str] = (), *, absolute: bool = False) -> dict[str, Any]:
    """A task by its resolved definition and its files on this machine, wherever its folder lies.

    Of lm-eval's own tasks, the harness's version stands for their code.

    Args:
        absolute: name the task's Python functions by their absolute paths, as version 0.1 did.
    """
    import lm_eval.tasks

    path = find_definition(name, include_path)
    if path is None:
        return {"task": name}
    config = read_definition(path)
    if not absolute:
        config = _movable(config, path.parent)
    found: dict[str, Any] = {"task": name, "config": json.loads(json.dumps(config, default=str))}
    if path.is_relative_to(Path(lm_eval.tasks.__file__).parent):
        found["lm_eval"] = lm_eval.__version__
    else:
        found["beside"] = _contents(path.parent)
    options = config.get("dataset_kwargs") or {}
    for key, folder in (("data", config.get("dataset_path")), ("data_dir", options.get("data_dir"))):
        data = Path(str(folder or ""))
        if data.name and data.is_dir():
            found[key] = _contents(data)
    if options.get("data_files"):
        found["files"] = [_digest(each) for each in _paths(options["data_files"]) if each.is_file()]
    return found


def contents_digest(
    pretrained: str,
    model_args: Mapping[str, Any],
    task: str,
    include_path: Sequence[str] = (),
    *,
    absolute: bool = False,
) -> str:
    """A digest that changes when a model's or a task's files do, so that earlier scores are outdated."""
    identity = task_identity(task, include_path, absolute=absolute)
    return digest([model_identity(pretrained, model_args), identity])


def _movable(value: Any, folder: Path) -> Any:
    """A definition whose functions (``/FOLDER/utils.name``) are named without the place of the folder.

    Code that lies elsewhere, which included definitions may name, counts with its contents or version.
    """
    import lm_eval.tasks

    if isinstance(value, dict):
        return {key: _movable(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_movable(each, folder) for each in value]
    if not isinstance(value, str) or value[:1] != "/" or "\n" in value or "." not in value:
        return value
    code = Path(f"{value.rpartition('.')[0]}.py")
    name = f"{code.stem}.{value.rpartition('.')[2]}"
    if code.is_relative_to(folder):
        return f"{code.relative_to(folder).parent}/{name}" if code.is_file() else value
    harness = Path(lm_eval.tasks.__file__).parent
    if code.is_relative_to(harness):
        return f"lm_eval {lm_eval.__version__}: {code.relative_to(harness).parent}/{name}"
    return f"{name} of {_digest(code)}" if code.is_file() else value


def _paths(files: Any) -> Iterable[Path]:
    if isinstance(files, Mapping):
        for key in sorted(files):
            yield from _paths(files[key])
    elif isinstance(files, list):
        for each in files:
            yield from _paths(each)
    else:
        path = Path(str(files))
        yield from sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _contents(folder: Path) -> str:
    """A digest of a folder's files; not of hidden ones, Python's caches, notes and this package's results."""
    return digest([[str(path.relative_to(folder)), _digest(path)] for path in _files(folder)])


def _files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__pycache__")) or path.suffix == ".md":
            continue
        if path.is_dir():
            if not path.is_symlink() and not any((path / name).exists() for name in _OURS):
                yield from _files(path)
        elif path.is_file():
            yield path


def _digest(path: Path) -> str:
    stat = path.stat()
    return _hashed(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hashed(path: Path, _size: int, _changed: int) -> str:
    """A file's whole digest: weights may change anywhere."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
