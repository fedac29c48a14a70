"""The commands that score a run again and train its vector again, from what is recorded of them."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

from lm_eval_aft.evaluation.results import ScoredRun, TaskRun, model_args
from lm_eval_aft.harness.commands import base_model, lm_eval_command, pairs, task_words
from lm_eval_aft.harness.tasks import read_definition


def commands(run: ScoredRun) -> list[str]:
    """One ``lm_eval`` call per results file and number of shots; none for a placebo without a file."""
    if (run.vector or {}).get("control") and not run.vector_path:
        return []
    calls: dict[tuple[Path, str], list[str]] = {}
    for task, each in run.tasks.items():
        # Tasks may have their own numbers of shots.
        shots = "" if _asked(each.results) else str(each.results.get("n-shot", {}).get(task))
        calls.setdefault((each.file, shots), []).append(task)
    return [_command(run, tasks) for tasks in calls.values()]


def _command(run: ScoredRun, tasks: list[str]) -> str:
    results = run.tasks[tasks[0]].results
    config: dict[str, Any] = results.get("config", {})
    template, multiturn = results.get("chat_template_sha"), results.get("fewshot_as_multiturn")
    sources = {task: _source(run.tasks[task].config) for task in tasks}
    names, folder = task_words(sources)
    settings = {
        "num_fewshot": results.get("n-shot", {}).get(tasks[0]),
        **{name: config.get(name) for name in ("batch_size", "device", "limit", "gen_kwargs")},
        "apply_chat_template": bool(template),
        "system_instruction": results.get("system_instruction"),
        "fewshot_as_multiturn": bool(multiturn) if template or multiturn else None,
        "seed": [config.get(f"{name}_seed") for name in ("random", "numpy", "torch", "fewshot")],
        "metadata": _given_metadata(run.tasks[tasks[0]]),
        "include_path": folder,
    }
    if all(seed is None for seed in settings["seed"]):
        del settings["seed"]
    # `aft eval` records what it was asked for: the name of a template, tasks as a group, and more.
    if asked := _asked(results):
        # A file's task goes by its name: lm-eval 0.4.12 reads no functions from a file that is named itself.
        words = {path.resolve(): word for path, word in zip(sources.values(), names, strict=True) if path}
        settings |= {"num_fewshot": None, **asked}
        given = settings.pop("tasks")
        names = (
            given if asked.get("include_path") else [words.get(Path(each).resolve(), each) for each in given]
        )
        settings["include_path"] = asked.get("include_path") or (folder if names != given else None)
    last = {"log_samples": True, "output_path": f"RESULTS/{run.name}"}
    return lm_eval_command(str(config.get("model")), model_args(results), names, settings | last)


def _asked(results: dict[str, Any]) -> dict[str, Any]:
    found = results["config"]["aft"].get("asked")
    return dict(found) if isinstance(found, dict) and isinstance(found.get("tasks"), list) else {}


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """A task's metadata; lm-eval takes anything there."""
    found = config.get("metadata")
    return found if isinstance(found, dict) else {}


def _source(config: dict[str, Any]) -> Path | None:
    found = _metadata(config).get("config_source")
    return Path(found) if isinstance(found, str) and found != "inline" else None


def _given_metadata(run: TaskRun) -> dict[str, Any]:
    """What was given as ``--metadata``: not the model arguments, nor what the task's file says."""
    own = {"version": None, "config_source": None, "device": None, **model_args(run.results)}
    source = _source(run.config)
    if source is not None and source.is_file():
        with contextlib.suppress(Exception):  # whatever is in a file of that name by now
            own |= _metadata(read_definition(source))
    return {key: value for key, value in _metadata(run.config).items() if key not in own}


# Settings of a plan that are no flags of the same name, or that flags set together with others.
_NO_FLAGS = {"task", "protocol", "prompts", "rft", "fingerprint", "documents", "tasks"}
# Flags for false; what else is false needs none.
_NEGATIVE = {"regression": "--no-regression", "fewshot_as_multiturn": "--fewshot-as-text"}


def training_command(settings: dict[str, Any], meta: dict[str, Any]) -> str:
    """The ``aft train`` call that trains this vector again, from the ledger's settings."""
    from lm_eval_aft.training.recipe import DEFAULT_PROTOCOL, PROTOCOLS  # torch

    protocol = dict(settings.get("protocol") or {})
    name = protocol.pop("name", DEFAULT_PROTOCOL)
    usual = PROTOCOLS[name].to_dict() if name in PROTOCOLS else {}
    model, arguments = base_model(meta)
    usually = {"method": "static", "positions": "all", "screen": "off", "calibrate": False}
    options = {
        "model": model,
        "task": str(settings["task"]).split(","),
        "protocol": name,
        # The protocol's own settings need no flag; its document counts are limits, not flags.
        **{
            key: _flag(value)
            for key, value in protocol.items()
            if value != usual.get(key) and key not in ("train_docs", "selection_docs")
        },
        **{k: v for k, v in settings.items() if k not in _NO_FLAGS and v != usually.get(k)},
        **{f"rft_{key}": value for key, value in (settings.get("rft") or {}).items()},
        **(settings.get("prompts") or {}),
        "model_args": arguments and pairs(arguments),
        "metadata": pairs(settings.get("task_metadata") or {}),
        "output": "VECTOR",
    }
    options.pop("task_metadata", None)
    words = ["aft", "train"]
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is False and key in _NEGATIVE:
            words.append(_NEGATIVE[key])
        elif isinstance(value, list | tuple):
            words += (word for each in value for word in (flag, str(each)))
        elif value is not None and value is not False and value not in ("", {}):
            words += [flag, str(value)]
    return shlex.join(words)


def _flag(value: Any) -> Any:
    """A setting as its flag takes it: lists comma-separated, 0 for "never"."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "0" if value is None else value
