"""The ``results_*.json`` files that lm-eval writes: found, decoded, and told apart by what they scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.evaluation_folder import is_begun
from lm_eval_aft.reporting.samples import AGAIN, decode

_MAPPINGS = (
    "config",
    "configs",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
    "groups",
    "task_hashes",
)


def find_results(source: Path) -> list[Path]:
    """Every results file below a folder, oldest first.

    Raises:
        AFTError: there is none.
    """
    if source.is_file() and source.suffix == ".json":
        return [source]
    seen = source.rglob("results_*.json")
    seen = (path for path in seen if not any(map(is_begun, path.relative_to(source).parts[:-1])))
    found = sorted(seen, key=lambda path: (path.name, str(path)))
    if not found:
        raise AFTError(f"No lm-eval results below {source}.", "Give the folder named by --output_path.")
    return found


def group_results(files: list[Path]) -> list[list[Path]]:
    """Results files by what was scored: model, its arguments, vector."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        results = read_results(file)
        config, info = results["config"], results["config"]["aft"]
        arguments = sorted(map(str, model_args(results).items()))
        identity = (config.get("model"), arguments, info["vector"].get("sha256"), info.get("answer_only"))
        groups.setdefault(repr(identity), []).append(file)
    return list(groups.values())


def read_results(file: Path) -> dict[str, Any]:
    """Decode a results file.

    Raises:
        AFTError: unreadable, damaged, or not such a file.
    """
    try:
        results = decode(file.read_bytes(), str(file))
    except OSError as error:
        raise AFTError(f"{file} cannot be read: {error.strerror}.", "Check the path.") from error
    if not isinstance(results.get("results"), dict):
        raise AFTError(f"{file} holds no lm-eval results.", "Give a results_*.json that lm_eval wrote.")
    for key in _MAPPINGS:
        _require_mapping(results, key, file)
    for parent in ("results", "configs", "higher_is_better"):
        for task in results[parent]:
            _require_mapping(results[parent], task, file)
    info = _require_mapping(results["config"], "aft", file)
    for key in ("fingerprint", "vector"):
        _require_mapping(info, key, file)
    return results


def _require_mapping(parent: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    """A part of a results file; missing or null counts as empty."""
    parent[key] = parent.get(key) or {}
    if not isinstance(parent[key], dict):
        raise AFTError(f"{file} is damaged: {key!r} is no mapping.", AGAIN)
    found: dict[str, Any] = parent[key]
    return found


def model_args(results: dict[str, Any]) -> dict[str, Any]:
    """The model arguments of a run, which lm-eval logs as a mapping or as text."""
    found = results.get("config", {}).get("model_args") or {}
    if isinstance(found, dict):
        return found
    return dict(part.partition("=")[::2] for part in str(found).split(",") if part)
