"""The demo's steered score by four ways: our hook, lm-eval's hook, a merged checkpoint, an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

import lm_eval_aft  # noqa: F401 - makes `aft` known to lm-eval
from lm_eval_aft import SteeringVector
from lm_eval_aft.demo import model_path
from lm_eval_aft.export.formats import export_vector
from lm_eval_aft.harness.tasks import task_manager_for, tasks_path
from lm_eval_aft.steering.hooks import attach

TASKS = ["aft_demo_choice", "aft_demo_math"]
LIMIT = 24
NORM = 5.4  # about what training gives this model


def score(model: str, limit: int | None, **arguments: Any) -> dict[str, list[dict[str, Any]]]:
    """Per-document samples of both tasks, in fp32."""
    results: Any = simple_evaluate(
        model=model,
        model_args={"softmax_dtype": "float32", "dtype": "float32", **arguments},
        tasks=TASKS,
        limit=limit,
        batch_size=16,
        device="cpu",
        task_manager=task_manager_for(TASKS, [str(tasks_path())]),
        bootstrap_iters=0,
        log_samples=True,
    )
    # One row per document and filter.
    return {
        task: sorted(results["samples"][task], key=lambda row: (row["filter"], row["doc_id"]))
        for task in TASKS
    }


def margin(vector: SteeringVector, row: dict[str, Any], other: dict[str, Any]) -> str:
    """Where two greedy continuations part, and by how much the steered model preferred the first."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path()).eval()
    context = row["arguments"]["gen_args_0"]["arg_0"]
    ours, theirs = (tokenizer(context + r["resps"][0][0])["input_ids"] for r in (row, other))
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
    with torch.no_grad(), attach(model, vector):
        top = model(torch.tensor([ours[:place]])).logits[0, -1].topk(2).values
    return f"document {row['doc_id']}: parts at token {place}, margin {float(top[0] - top[1]):.2e}"


def differences(
    vector: SteeringVector, one: dict[str, list[Any]], other: dict[str, list[Any]]
) -> tuple[int, float, list[str]]:
    """Documents compared, largest difference of a log-likelihood, and greedy flips with their margins."""
    largest, flips, count = 0.0, [], 0
    for task in TASKS:
        assert len(one[task]) == len(other[task])
        for a, b in zip(one[task], other[task], strict=True):
            assert (a["doc_hash"], a["arguments"]) == (b["doc_hash"], b["arguments"])
            for metric in a["metrics"]:
                assert a[metric] == b[metric], (task, a["doc_id"], metric)
            count += 1
            if task == "aft_demo_math":
                if a["resps"] != b["resps"]:
                    flips.append(margin(vector, a, b))
                continue
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                largest = max(largest, abs(float(x[0]) - float(y[0])))
    return count, largest, flips


def compare_all(vector: SteeringVector, folder: Path, limit: int | None) -> dict[str, Any]:
    vector.save(folder / "vector")
    for kind, name in (("merged", "merged"), ("peft", "adapter"), ("steered", "v.pt")):
        export_vector(vector, kind, folder / name, model="demo")
    demo = str(model_path())
    ours = score("aft", limit, pretrained="demo", vector=str(folder / "vector"))
    others = {
        "merged": score("hf", limit, pretrained=str(folder / "merged")),
        "peft": score("hf", limit, pretrained=demo, peft=str(folder / "adapter")),
        "steered": score("steered", limit, pretrained=demo, steer_path=str(folder / "v.pt")),
    }
    return {
        "baseline": score("hf", limit, pretrained=demo),
        "ours": ours,
        "found": {name: differences(vector, ours, rows) for name, rows in others.items()},
    }


def test_four_ways_give_one_score(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    direction = torch.randn(128, generator=torch.Generator().manual_seed(2))
    vector = SteeringVector({1: direction * (NORM / direction.norm())})
    result = compare_all(vector, tmp_path, LIMIT)
    for name, (count, largest, flips) in result["found"].items():
        print(f"{name}: {count} rows, log-likelihoods within {largest:.1e}, greedy flips: {flips or 'none'}")
        assert largest <= 1e-4, name
    assert result["ours"] != result["baseline"]
    choices = [rows["aft_demo_choice"] for rows in (result["ours"], result["baseline"])]
    assert any(a["filtered_resps"] != b["filtered_resps"] for a, b in zip(*choices, strict=True))
