"""The exact commands that make a run again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from lm_eval_aft.reporting.results import Run
from lm_eval_aft.reporting.results_files import model_args


def commands(run: Run) -> list[str]:
    """One ``lm_eval`` call per results file and number of shots; none for a placebo without a file."""
    if (run.vector or {}).get("control") and not run.vector_path:
        return []
    calls: dict[tuple[Path, str], list[str]] = {}
    for task, each in run.tasks.items():
        # Tasks may have been asked with shots of their own.
        calls.setdefault((each.file, str(each.results.get("n-shot", {}).get(task))), []).append(task)
    return [_command(run, tasks, shots) for (_, shots), tasks in calls.items()]


def _command(run: Run, tasks: list[str], shots: str) -> str:
    results = run.tasks[tasks[0]].results
    config: dict[str, Any] = results.get("config", {})
    words = ["lm_eval", "--model", str(config.get("model"))]
    arguments = ",".join(f"{key}={value}" for key, value in model_args(results).items())
    if arguments:
        words += ["--model_args", arguments]
    words += ["--tasks", ",".join(tasks)]
    if shots != "None":
        words += ["--num_fewshot", shots]
    for flag in ("batch_size", "device", "limit"):
        if config.get(flag) is not None:
            value = config[flag]
            text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
            words += [f"--{flag}", text]
    generation = config.get("gen_kwargs")
    if generation:
        words += ["--gen_kwargs", _pairs(generation) if isinstance(generation, dict) else str(generation)]
    if results.get("chat_template_sha"):
        words.append("--apply_chat_template")
    if results.get("system_instruction"):
        words += ["--system_instruction", str(results["system_instruction"])]
    if results.get("fewshot_as_multiturn"):
        words.append("--fewshot_as_multiturn")
    elif results.get("chat_template_sha"):  # else a template turns it on
        words += ["--fewshot_as_multiturn", "false"]
    seeds = [config.get(f"{name}_seed") for name in ("random", "numpy", "torch", "fewshot")]
    if any(seed is not None for seed in seeds):
        words += ["--seed", ",".join(map(str, seeds))]
    for folder in _task_folders(results, tasks):
        words += ["--include_path", folder]
    return shlex.join([*words, "--log_samples", "--output_path", f"RESULTS/{run.name}"])


def _task_folders(results: dict[str, Any], tasks: list[str]) -> list[str]:
    """Folders of task files that are not lm-eval's own; lm-eval takes one."""
    found = []
    for task in tasks:
        source = (results.get("configs", {}).get(task, {}).get("metadata") or {}).get("config_source")
        if source and "lm_eval/tasks" not in Path(source).as_posix():
            found.append(str(Path(source).parent))
    return list(dict.fromkeys(found))[:1]


def _pairs(values: dict[str, Any]) -> str:
    """``key=value,key=value`` where that says it, else JSON, which lm-eval reads too."""
    if all(isinstance(value, str | int | float) and "," not in str(value) for value in values.values()):
        return ",".join(f"{key}={value}" for key, value in values.items())
    return json.dumps(values)
