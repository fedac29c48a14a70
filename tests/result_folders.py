"""Writes result folders as lm-eval does, from outcomes alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAMP = "2026-01-01T00-00-00.000000"
VOCABULARY = "c" * 64


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_results(
    folder: Path,
    outcomes: dict[str, Sequence[float]],
    *,
    metric: str = "acc",
    others: dict[str, dict[str, Sequence[float]]] | None = None,
    first_document: int = 0,
    fewshot: str = "",
    question: str = "Question",
    target: str = "0",
    gen_kwargs: dict[str, Any] | None = None,
    doc: dict[str, Any] | None = None,
    aft: dict[str, Any] | None = None,
    vector: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    task_config: dict[str, Any] | None = None,
    top: dict[str, Any] | None = None,
    version: float = 1.0,
    shots: int = 0,
    stamp: str = STAMP,
) -> Path:
    """One run: task -> score of ``metric`` per document; ``others`` adds task -> metric -> scores."""
    folder = folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, Any]] = {}
    for task, values in outcomes.items():
        metrics = {metric: values, **(others or {}).get(task, {})}
        lines = []
        for i in range(len(values)):
            own = (doc or {}) | {"question": f"{question} {first_document + i}?"}
            context = f"{fewshot}{own['question']}\nAnswer:"
            if gen_kwargs is None:
                asked = [(context, " yes"), (context, " no")]
                responses = [[["-1.0", "False"]], [["-2.5", "False"]]]
            else:
                asked, responses = [(context, gen_kwargs)], [["So the answer is 4"]]
            lines.append(
                {
                    "doc_id": i,
                    "doc": own,
                    "target": target,
                    "arguments": {
                        f"gen_args_{k}": {"arg_0": a, "arg_1": b} for k, (a, b) in enumerate(asked)
                    },
                    "resps": responses,
                    "filtered_resps": [r[0] for r in responses],
                    "filter": "none",
                    "metrics": list(metrics),
                    "doc_hash": digest(json.dumps(own, indent=2)),
                    "prompt_hash": digest(context),
                    "target_hash": digest(target),
                    **{name: column[i] for name, column in metrics.items()},
                }
            )
        (folder / f"samples_{task}_{stamp}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        scores[task] = {"sample_len": len(values)} | {
            f"{name},none": sum(column) / len(column)
            for name, column in metrics.items()
            if all(isinstance(value, int | float) for value in column)
        }
    info = {
        "fingerprint": {"config": "a" * 64, "parameters": "b" * 64, "vocabulary": VOCABULARY},
        "world_size": 1,
        "softmax_dtype": "torch.float32",
        "vector": vector,
    } | (aft or {})
    results = {
        "results": scores,
        "group_subtasks": {},
        "configs": {
            task: {
                "task": task,
                "output_type": "multiple_choice" if gen_kwargs is None else "generate_until",
                "target_delimiter": " ",
                "num_fewshot": shots,
                "repeats": 1,
                "metric_list": [
                    {"metric": name, "aggregation": "mean", "higher_is_better": True}
                    for name in (metric, *(others or {}).get(task, {}))
                ],
                **({"generation_kwargs": gen_kwargs} if gen_kwargs else {}),
                **(task_config or {}),
            }
            for task in outcomes
        },
        "versions": dict.fromkeys(outcomes, version),
        "n-shot": dict.fromkeys(outcomes, shots),
        "higher_is_better": {
            task: {
                entry["metric"]: entry["higher_is_better"]
                for entry in (task_config or {}).get("metric_list", [])
            }
            or {metric: True}
            for task in outcomes
        },
        "n-samples": {
            task: {"original": len(values), "effective": len(values)} for task, values in outcomes.items()
        },
        "config": {
            "model": "aft",
            "model_args": {"pretrained": "some/model"} | ({"vector": "arc"} if vector else {}),
            "model_dtype": "torch.float32",
            "aft": info,
            "batch_size": 8,
            "device": "cpu",
            "limit": None,
            "gen_kwargs": {},
            "random_seed": 0,
            "numpy_seed": 1234,
            "torch_seed": 1234,
            "fewshot_seed": 1234,
        }
        | (config or {}),
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.23.0",
        "tokenizer_pad_token": ["<pad>", "1"],
        "tokenizer_eos_token": ["<eos>", "0"],
        "tokenizer_bos_token": ["<eos>", "0"],
        "max_length": 128,
        "model_source": "aft",
        "model_name": "some/model",
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "chat_template_sha": None,
        "total_evaluation_time_seconds": "12.5",
    } | (top or {})
    (folder / f"results_{stamp}.json").write_text(json.dumps(results))
    return folder.parent


def steered_by(**change: Any) -> dict[str, Any]:
    """What ``--model aft`` logs of a vector."""
    return {
        "sha256": "d" * 64,
        "layers": [3],
        "coefficient": 1.0,
        "positions": "all",
        "method": "static",
        "norm": 2.0,
        "task": "arc_challenge",
        "num_fewshot": 0,
        "control": None,
    } | change
