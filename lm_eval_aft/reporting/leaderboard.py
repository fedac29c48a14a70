"""The Open LLM Leaderboard v1's settings, and scores published under them."""

from __future__ import annotations

from typing import Any

from lm_eval_aft.reporting.results import Run
from lm_eval_aft.reporting.results_files import model_args

# task -> (n-shot, metric, filter), as the leaderboard's first version set them.
SETTINGS: dict[str, tuple[int, str, str]] = {
    "arc_challenge": (25, "acc_norm", "none"),
    "hellaswag": (10, "acc_norm", "none"),
    "gsm8k": (5, "exact_match", "strict-match"),
}
# Scores in percent, from the model cards' records of that leaderboard.
PUBLISHED: dict[str, dict[str, float]] = {
    "Qwen/Qwen1.5-0.5B": {"arc_challenge": 31.48, "hellaswag": 49.05},
    "microsoft/phi-1_5": {"arc_challenge": 52.90, "hellaswag": 63.79, "gsm8k": 12.43},
    "stabilityai/stablelm-2-1_6b": {"arc_challenge": 43.43, "hellaswag": 70.49, "gsm8k": 17.82},
}
WORDING = (
    "Same settings as the Open LLM Leaderboard v1, not the same numbers: it ran an older version of the "
    "harness, so scores may differ by a little even for the same model."
)


def leaderboard_rows(baseline: Run, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The three tasks' rows, whether they had the leaderboard's settings, and the calibration.

    Args:
        rows: a report's rows, as plain values.
    """
    model = str(baseline.any.get("model_name") or model_args(baseline.any).get("pretrained") or "")
    published = next((v for k, v in PUBLISHED.items() if model in (k, k.split("/")[1])), {})
    found = []
    for task, (shots, metric, filter_name) in SETTINGS.items():
        own = [r for r in rows if (r["task"], r["metric"], r["filter"]) == (task, metric, filter_name)]
        if task not in baseline.tasks:
            problems = ["not scored"]
        else:
            problems = _deviations(baseline, task, shots)
            if not own:
                problems.append(f"no {metric} ({filter_name})")
        reference = published.get(task)
        score = 100 * own[0]["baseline"] if own else None
        found.append(
            {
                "task": task,
                "num_fewshot": shots,
                "metric": metric if filter_name == "none" else f"{metric},{filter_name}",
                "same_settings": not problems,
                "deviations": problems,
                "published": reference,
                "calibration": score - reference if score is not None and reference is not None else None,
                "rows": own,
            }
        )
    return found


def _deviations(run: Run, task: str, shots: int) -> list[str]:
    each = run.tasks[task]
    results, found = each.results, []
    if results.get("n-shot", {}).get(task) != shots:
        found.append(f"{results.get('n-shot', {}).get(task)}-shot")
    counts = results.get("n-samples", {}).get(task, {})
    scored = max(map(len, each.samples.values()))
    if counts.get("original") not in (None, scored):
        found.append(f"{scored} of {counts['original']} documents")
    elif limit := results.get("config", {}).get("limit"):
        found.append(f"limit {limit:g}" if isinstance(limit, int | float) else f"limit {limit}")
    elif "original" not in counts:
        found.append(f"{scored} documents, of how many is not logged")
    if run.answer_only:
        found.append("scored without the questions")
    if results.get("chat_template_sha"):
        found.append("chat template")
    if results.get("system_instruction_sha"):
        found.append("system instruction")
    if results.get("config", {}).get("gen_kwargs"):
        found.append("gen_kwargs")
    return found
