"""What a model or a task *is*, as far as a result depends on it: digests of contents, not of names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_aft.demo import resolve_pretrained
from lm_eval_aft.harness import find_definition
from lm_eval_aft.vector import canonical_json

WHOLE = 8 * 2**20  # bytes up to which a file is read whole
ENDS = 2**20


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that name a JSON-serialisable value."""
    return hashlib.sha256(canonical_json({"": value}).encode()).hexdigest()[:16]


def model_identity(pretrained: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """A folder by its contents, a Hub model by its name, with the arguments it is loaded with."""
    path = Path(resolve_pretrained(pretrained))
    what = _contents(path) if path.is_dir() else pretrained
    return {"model": what, "args": json.loads(canonical_json(dict(model_args)))}


def task_identity(name: str, include_path: Sequence[str] = ()) -> dict[str, Any]:
    """A task by its resolved definition and by those of its files that lie on this machine.

    Tasks of lm-eval's own are told by their definition and the harness's version, which holds their code.
    """
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    path = find_definition(name, include_path)
    if path is None:
        return {"task": name}
    config = load_yaml(path, resolve_func=False, recursive=True)
    found: dict[str, Any] = {"task": name, "config": json.loads(json.dumps(config, default=str))}
    if path.is_relative_to(Path(lm_eval.tasks.__file__).parent):
        found["lm_eval"] = lm_eval.__version__
    else:
        found["beside"] = _contents(path.parent)
    data = Path(str(config.get("dataset_path") or ""))
    if data.name and not data.is_absolute() and data.is_dir():
        found["data"] = _contents(data)
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files:
        found["files"] = [_sketch(each) for each in _paths(files) if each.is_file()]
    return found


def _paths(files: Any) -> Iterable[Path]:
    if isinstance(files, Mapping):
        for key in sorted(files):
            yield from _paths(files[key])
    elif isinstance(files, list):
        for each in files:
            yield from _paths(each)
    else:
        yield Path(str(files))


def _contents(folder: Path) -> str:
    """A digest of a folder's files, hidden ones and Python's caches left out."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
    ]
    return digest([[str(path.relative_to(folder)), _sketch(path)] for path in files])


def _sketch(path: Path) -> str:
    """A file's digest; of large ones the size and both ends."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= WHOLE:
            return hashlib.sha256(stream.read()).hexdigest()
        head = stream.read(ENDS)
        stream.seek(-ENDS, 2)
        return hashlib.sha256(f"{size}|".encode() + head + stream.read()).hexdigest()
