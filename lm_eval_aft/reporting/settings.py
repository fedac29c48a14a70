"""The settings of a run that decide what was asked and how answers were scored."""

from __future__ import annotations

import json
from typing import Any

from lm_eval_aft.reporting.results import Run, TaskRun
from lm_eval_aft.reporting.results_files import model_args

# Whether the questions were taken away: prompts are logged as the task made them, so only this tells.
ANSWER_ONLY = "answer_only"


def run_settings(results: dict[str, Any]) -> dict[str, Any]:
    """What must be equal between runs whatever the task: field -> value, spellings made alike."""
    config, arguments = results.get("config", {}), model_args(results)
    info = config.get("aft") or {}
    softmax = info.get("softmax_dtype") or arguments.get("softmax_dtype")
    return {
        "tokenizer": {key: results.get(f"tokenizer_{key}") for key in ("pad_token", "eos_token", "bos_token")}
        | {"vocabulary": (info.get("fingerprint") or {}).get("vocabulary")},
        "maximum length": results.get("max_length"),
        "chat template": results.get("chat_template_sha"),
        "system instruction": results.get("system_instruction_sha"),
        "fewshot_as_multiturn": bool(results.get("fewshot_as_multiturn")),
        "limit": config.get("limit"),
        "gen_kwargs": _plain(config.get("gen_kwargs")) or {},
        "dtype": _dtype(config.get("model_dtype") or arguments.get("dtype")),
        "softmax dtype": _dtype(softmax),
        ANSWER_ONLY: bool(info.get("answer_only")),
    }


def task_settings(run: TaskRun) -> dict[str, Any]:
    """What must be equal between runs of one task: field -> value."""
    results, config, task = run.results, run.config, run.task
    shots = results.get("n-shot", {}).get(task)
    generation = _plain(config.get("generation_kwargs")) or {}
    seeds = results.get("config", {})
    sampled = bool(isinstance(generation, dict) and generation.get("do_sample"))
    return {
        "task version": results.get("versions", {}).get(task),
        "n-shot": shots,
        # Without examples in the prompt the seed that would have drawn them decides nothing.
        "few-shot seed": seeds.get("fewshot_seed") if shots != 0 else None,
        "sampling seed": seeds.get("torch_seed") if sampled else None,
        "generation_kwargs": generation,
        "repeats": config.get("repeats") or 1,
        "filters": _plain(config.get("filter_list")),
        "metrics": _plain(config.get("metric_list")),
    }


def differing(first: Run, second: Run, tasks: list[str]) -> list[str]:
    """Every setting that differs, in words, with both values; prompts and documents not included."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        before, after = first.tasks[task], second.tasks[task]
        for where, left, right in (
            ("", run_settings(before.results), run_settings(after.results)),
            (f" of {task}", task_settings(before), task_settings(after)),
        ):
            for key in left:
                if _differs(left[key], right[key]):
                    text = f"{key}{where} ({_short(left[key])} against {_short(right[key])})"
                    found.setdefault(text, []).append(task)
    return list(found)


def described(run: Run) -> dict[str, str]:
    """The settings table's column of a run: field -> text."""
    results = run.any
    config, info = results.get("config", {}), results.get("config", {}).get("aft") or {}
    vector = run.vector or {}
    identity = info.get("fingerprint") or {}
    rows: dict[str, Any] = {
        "model type": config.get("model"),
        "model": results.get("model_name") or model_args(results).get("pretrained"),
        "model revision": config.get("model_revision"),
        "model parameters": config.get("model_num_parameters"),
        "base model fingerprint": fingerprint_text(identity),
        "vector": run.vector_path,
        "library": run.library,
        "router": (run.routing or {}).get("router"),
        "router sha256": (run.routing or {}).get("router_sha256"),
        "routed vectors": list((run.routing or {}).get("vectors") or {}) or None,
        "vector sha256": vector.get("sha256"),
        "vector layers": vector.get("layers"),
        "vector norm": _number(vector.get("norm"), 4),
        "coefficient": vector.get("coefficient"),
        "control": vector.get("control"),
        **run_settings(results),
        "batch size": config.get("batch_size"),
        "device": config.get("device"),
        "hardware": _hardware(results.get("pretty_env_info")),
        "world size": info.get("world_size"),
        "scoring path": info.get("scoring_path"),
        "lm-eval": results.get("lm_eval_version"),
        "transformers": results.get("transformers_version"),
        "evaluation seconds": _number(results.get("total_evaluation_time_seconds"), 1),
    }
    rows["tokenizer"] = str(rows["tokenizer"]["vocabulary"] or "")[:16] or rows["tokenizer"]["eos_token"]
    rows[ANSWER_ONLY] = rows[ANSWER_ONLY] or None  # told only of runs that were scored so
    for task, each in run.tasks.items():
        own = task_settings(each)
        rows[f"{task}: version"] = own["task version"]
        rows[f"{task}: n-shot"] = own["n-shot"]
        rows[f"{task}: few-shot seed"] = own["few-shot seed"]
        rows[f"{task}: documents, prompts and targets"] = results_hash(each)
    return {key: _short(value) for key, value in rows.items() if value not in (None, "", {})}


def results_hash(run: TaskRun) -> str | None:
    """lm-eval's own digest of a task's documents, prompts and targets, shortened."""
    value = run.results.get("task_hashes", {}).get(run.task)
    return str(value)[:16] if value else None


def fingerprint_text(identity: dict[str, Any]) -> str | None:
    """A base model's fingerprint in 24 characters."""
    if not identity:
        return None
    return "-".join(str(identity.get(key, ""))[:8] for key in ("config", "parameters", "vocabulary"))


def _differs(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        # A part that only one side logs (another model type) cannot be compared.
        if set(left) == {"pad_token", "eos_token", "bos_token", "vocabulary"}:
            return any(left[k] != right[k] for k in left if left[k] is not None and right[k] is not None)
        return json.dumps(left, sort_keys=True) != json.dumps(right, sort_keys=True)
    return bool(left != right)


def _dtype(value: Any) -> str | None:
    return None if value in (None, "", "None") else str(value).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """JSON as it would be read back, so that a tuple equals a list; text of a mapping decoded."""
    if isinstance(value, str) and "=" in value:
        from lm_eval.utils import simple_parse_args_string

        return dict(simple_parse_args_string(value))
    return json.loads(json.dumps(value, default=str))


def _hardware(text: Any) -> str | None:
    wanted = ("Model name:", "CPU(s):", "GPU models and configuration:")
    found = []
    for line in str(text or "").splitlines():
        key, _, value = line.partition(":")
        if f"{key.strip()}:" in wanted and value.strip() and "Could not" not in value:
            found.append(f"{value.strip()} CPUs" if key.strip() == "CPU(s)" else value.strip())
    return ", ".join(dict.fromkeys(found)) or None


def _number(value: Any, digits: int) -> str | None:
    try:
        return f"{float(value):.{digits}f}"
    except (TypeError, ValueError):
        return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
