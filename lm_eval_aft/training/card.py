"""The model card (README.md) of a vector folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lm_eval_aft.library.entry import task_names
from lm_eval_aft.methods import METHODS
from lm_eval_aft.vector import SteeringVector, replacing

_BODY = """\
# {title}

A steering vector for [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness):
{numbers}, added to the residual stream of `{model}` at the output of block
{layer} (of {depth}, counted from 0){tokens}. {origin}{control}

    lm_eval --model aft --model_args pretrained={model},vector=FOLDER --tasks {task}
{results}{section}"""

_SELECTION = """
## Selection split

These scores chose the layer and the epoch, so they flatter the vector: **they are not results**.
Score the evaluation split with the command above. Cross-entropy in nats after fitting one
temperature; mean over {seeds} seed(s); {n} documents.

| layer | cross-entropy | accuracy |
|---|---|---|
{rows}
"""

_ROUNDS = """
## Rounds

Rejection-sampling fine-tuning: each round trained on solutions that the model wrote itself (at
temperature {temperature:g}, steered by the round before) and `{metric}` after the filter `{filter}`
marked right. Shares of {problems} selection problems solved, greedily and with k samples: they chose the
round ({best_round}; 0 is the baseline) and **are not results**.

| round | kept | greedy | {sizes} |
|---|---|---|{rules}
{rows}
"""

_RECIPE = """
## Recipe

    {expression}

| vector | weight | coefficient | layers | tasks | sha256 |
|---|---|---|---|---|---|
{rows}
"""


def write_card(folder: Path, vector: SteeringVector, results: Sequence[dict[str, Any]] = ()) -> None:
    """Write ``README.md`` into a vector folder, from the vector's metadata and its results, if any.

    Args:
        results: rows of a comparison with the baseline on evaluation documents, as
            `lm_eval_aft.reporting.cards.card_results` gives them.
    """
    meta = vector.metadata
    tasks = task_names(meta)
    data = ModelCardData(
        library_name="lm-eval-aft",
        base_model=_hub_name(meta),
        tags=["activation-steering", "steering-vector", "lm-eval-aft", *(f"task:{task}" for task in tasks)],
        datasets=list(dict.fromkeys(r["dataset"] for r in results if _is_hub_name(r["dataset"]))) or None,
        model_name=_title(meta) if results else None,
        eval_results=[_eval_result(result) for result in results] or None,
    )
    if data.base_model:
        data["base_model_relation"] = "adapter"
    text = f"---\n{data.to_yaml()}\n---\n\n{_text(vector, results)}"
    with replacing(folder / "README.md") as temporary:
        ModelCard(text).save(temporary)


def _eval_result(result: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=result["dataset"] or result["task"],
        dataset_name=result["task"],
        metric_type=result["metric"],
        metric_name=f"{result['metric']} ({result['num_fewshot']}-shot)",
        metric_value=result["value"],
    )


def _result_table(results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return ""
    lines = [
        "\n## Results\n",
        "Baseline and steered model on the same evaluation documents; differences in percentage points",
        "with their paired 95 % interval; p is Holm-adjusted where there is a verdict.\n",
        "| task | metric | n-shot | n | baseline | steered | difference | 95 % interval | p | verdict |",
        f"|{'---|' * 10}",
    ]
    names = (
        *("task", "metric", "num_fewshot", "n", "baseline", "steered"),
        *("difference", "interval", "p", "verdict"),
    )
    for result in results:
        lines.append("| " + " | ".join(str(result[name]).replace("|", "\\|") for name in names) + " |")
    return "\n".join([*lines, ""])


def _text(vector: SteeringVector, results: Sequence[dict[str, Any]]) -> str:
    meta: dict[str, Any] = vector.metadata
    control = meta.get("control")
    return _BODY.format(
        title=_title(meta),
        origin=_origin(meta),
        results=_result_table(results),
        numbers=_numbers(vector),
        tokens="" if vector.positions == "all" else f", to tokens in the positions `{vector.positions}` only",
        model=_model(meta) or "MODEL",
        layer=", ".join(map(str, vector.layers)),
        depth=meta.get("num_hidden_layers", "an unknown number"),
        task=",".join(task_names(meta)) or "TASK",
        control=f"\n\n**This is a placebo (`{control}`), not a vector to use.**" if control else "",
        section=_selection_section(vector) + _rounds_section(meta) or _recipe_section(meta),
    )


def _numbers(vector: SteeringVector) -> str:
    count = sum(tensor.numel() for tensor in vector.tensors.values())
    if vector.method == "static":
        return f"{count} numbers"
    return f"{count:,} numbers (method `{vector.method}`: {METHODS[vector.method].formula})"


def _origin(meta: dict[str, Any]) -> str:
    if meta.get("recipe"):
        return "Composed of other vectors, not trained: see its recipe."
    if not (meta.get("splits") and meta.get("task")):
        return "Nothing is recorded of how it was made."
    tasks, shots = task_names(meta), meta.get("num_fewshot")
    named = ", ".join(f"`{task}`" for task in tasks)
    return (
        f"Trained on the training split{'s' * (len(tasks) > 1)} of {named}\n"
        f"({'each with its own number of examples' if shots is None else f'{shots}-shot'}, objective "
        f"`{meta.get('objective')}`, {meta['splits'].get('train')} documents)."
    )


def _selection_section(vector: SteeringVector) -> str:
    selection = vector.metadata.get("selection")
    if not selection:
        return ""
    baseline = selection["baseline"]
    rows = [f"| baseline | {baseline['score']:.4f} | {baseline['accuracy']:.4f} |"]
    for layer, result in selection["layers"].items():
        mark = " (chosen)" if int(layer) in vector.layers else ""
        rows.append(f"| {layer}{mark} | {result['score']:.4f} | {result['accuracy']:.4f} |")
    return _SELECTION.format(
        seeds=(vector.metadata.get("protocol") or {}).get("seeds"), n=baseline["n"], rows="\n".join(rows)
    )


def _rounds_section(meta: dict[str, Any]) -> str:
    rft = meta.get("rft")
    if not rft:
        return ""
    table = rft["table"]
    sizes = list(table[0]["pass_at"])
    rows = []
    for each in table:
        kept = f"{each['kept']} of {each['tried']}" if "kept" in each else ""
        shares = (each["greedy"], *(each["pass_at"][k] for k in sizes))
        rows.append(f"| {each['round']} | {kept} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return _ROUNDS.format(
        **{key: rft[key] for key in ("temperature", "metric", "filter", "best_round")},
        problems=table[0]["problems"],
        sizes=" | ".join(f"pass@{k}" for k in sizes),
        rules="---|" * len(sizes),
        rows="\n".join(rows),
    )


def _recipe_section(meta: dict[str, Any]) -> str:
    recipe = meta.get("recipe")
    if not recipe:
        return ""
    rows = [
        f"| {each['name']} | {each['weight']:g} | {each['coefficient']:g} | "
        f"{', '.join(map(str, each['layers']))} | {', '.join(each['tasks'])} | `{each['sha256'][:12]}` |"
        for each in recipe["operands"]
    ]
    return _RECIPE.format(expression=recipe["expression"], rows="\n".join(rows))


def _title(meta: dict[str, Any]) -> str:
    tasks = str(meta.get("task") or "Steering vector").replace(",", ", ")
    return f"{tasks} for {Path(_model(meta) or 'an unnamed model').name}"


def _model(meta: dict[str, Any]) -> str:
    return str((meta.get("base_model") or {}).get("name") or "")


def _hub_name(meta: dict[str, Any]) -> str | None:
    """The base model's name if it is one the Hub could know; a local path is not."""
    name = _model(meta)
    return name if _is_hub_name(name) else None


def _is_hub_name(name: str | None) -> bool:
    return bool(name) and str(name).count("/") <= 1 and not str(name).startswith((".", "/"))
