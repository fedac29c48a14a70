"""Digests of models and tasks by their contents, so that changed files are noticed under the same name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval_aft._util.files import canonical_json
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
    path = Path(resolve_pretrained(pretrained))
    what = _contents(path) if path.is_dir() else pretrained
    found = {"model": what, "args": json.loads(canonical_json(dict(model_args)))}
    named = {key: Path(value) for key, value in model_args.items() if isinstance(value, str) and value}
    if folders := {key: _contents(place) for key, place in named.items() if place.is_dir()}:
        found["folders"] = folders
    return found


def task_identity(name: str, include_path: Sequence[str] = ()) -> dict[str, Any]:
    """A task by its resolved definition and its files on this machine.

    Of lm-eval's own tasks, the harness's version stands for their code.
    """
    import lm_eval.tasks

    path = find_definition(name, include_path)
    if path is None:
        return {"task": name}
    config = read_definition(path)
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
    pretrained: str, model_args: Mapping[str, Any], task: str, include_path: Sequence[str] = ()
) -> str:
    """A digest that changes when a model's or a task's files do, so that earlier scores are outdated."""
    return digest([model_identity(pretrained, model_args), task_identity(task, include_path)])


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
