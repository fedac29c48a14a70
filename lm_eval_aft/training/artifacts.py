"""What a finished run writes: the vector's header, the model card, ``sweep.png`` and ``training.html``."""

from __future__ import annotations

import copy
import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import replacing
from lm_eval_aft._util.pages import (
    RenderedTable,
    heat_map,
    layer_curve,
    line_chart,
    render_template,
    training_curves,
)
from lm_eval_aft._util.process import now
from lm_eval_aft.demo import command_name
from lm_eval_aft.harness.commands import vector_command
from lm_eval_aft.library.entry import task_names
from lm_eval_aft.library.files import RESULTS
from lm_eval_aft.steering.backbone import Backbone, final_norm
from lm_eval_aft.steering.fingerprint import tokenizer_facts
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.steering.vector import SteeringVector, length_metadata
from lm_eval_aft.training.candidate import Candidate, Workers, rate_text
from lm_eval_aft.training.recipe import TrainingPlan
from lm_eval_aft.training.selection import median_seed
from lm_eval_aft.training.setup import Prepared, random_like
from lm_eval_aft.training.sweep import Calibration, LayerResult, SweepResult


def finished_vector(
    candidate: Candidate,
    metadata: dict[str, Any],
    control: str | None,
    calibration: Calibration | None = None,
) -> SteeringVector:
    """A finalist's best epoch as a vector; a random direction of its norm for that control.

    Raises:
        AFTError: it never had a finite score.
    """
    if candidate.best is None or candidate.best_score is None:
        raise AFTError(f"{candidate.name} has no finite score.", "Lower the learning rate.")
    own = {
        "seed": candidate.seed,
        "epoch": candidate.best_epoch,
        "selection": {**metadata["selection"], "vector": candidate.best_score.to_dict()},
    }
    intervention = candidate.intervention
    layers = {layer: candidate.best[f"layers.{layer}"] for layer in intervention.layers}
    own |= length_metadata(intervention.method, layers, candidate.norms)
    if calibration:
        own["calibration"] = calibration.to_dict()
    vector = SteeringVector.from_tensors(
        candidate.best,
        coefficient=calibration.coefficient if calibration else 1.0,
        positions=intervention.positions,
        method=intervention.method.name,
        metadata={**metadata, **own},
    )
    return random_like(vector, candidate.seed) if control == "random" else vector


def training_metadata(
    prepared: Prepared,
    sweep: SweepResult,
    *,
    identity: dict[str, Any],
    engine: str,
    seconds: float,
    drawn: int,
    screen: dict[str, Any] | None,
) -> dict[str, Any]:
    """The header entries that all finalists of a run share.

    Args:
        identity: the base model's fingerprint.
        drawn: number of training documents that a seed draws.
        screen: the screen's result, if it ran.
    """
    plan, lm, splits = prepared.plan, prepared.lm, prepared.splits
    name = lm.pretrained if isinstance(lm.pretrained, str) else getattr(lm.pretrained, "name_or_path", "")
    args = {key: plain(value) for key, value in lm.model_args.items() if key not in _NOT_OF_THE_MODEL}
    template = getattr(lm.tokenizer, "chat_template", None) if plan.prompts.apply_chat_template else None
    return {
        "num_hidden_layers": len(prepared.backbone.blocks),
        "base_model": {"name": str(name), "revision": lm.revision, **({"args": args} if args else {})},
        "fingerprint": identity,
        "tokenizer": tokenizer_facts(lm.tokenizer),
        **_tasks(prepared),
        "prompts": asdict(plan.prompts),
        **({"include_path": list(plan.include_path)} if plan.include_path else {}),
        **({"task_metadata": plan.task_metadata} if plan.task_metadata else {}),
        "chat_template": template and hashlib.sha256(str(template).encode()).hexdigest(),
        "objective": prepared.objective.name,
        "metric": prepared.objective.metric,
        **({"metric_note": prepared.objective.note} if prepared.objective.note else {}),
        "loss": loss.to_dict() if (loss := prepared.objective.loss) else None,
        "control": plan.control,
        "parameters": prepared.method.parameters(prepared.backbone.hidden_size, len(prepared.layers)),
        "protocol": {
            **plan.protocol.to_dict(),
            **_asked_documents(plan),
            "layers": prepared.layers,
            "chosen": sweep.finalist.chosen,
            "retries_used": sweep.retries,
            "pruned": sweep.pruned,
            **sweep.notes,
            **({"screen_result": screen} if screen else {}),
        },
        "engine": engine,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "processes": Workers().size,
        "splits": {
            **splits.counts,
            "train": drawn,
            "selection_sha256": splits.selection_digest,
            "selection_documents": list(splits.selection_documents),
        },
        "selection": {
            "baseline": sweep.baseline.to_dict(),
            "layers": {str(result.layer): _layer(result, sweep) for result in sweep.layers},
        },
        "seconds": round(seconds, 1),
        "created": now(),
        "versions": _versions(),
    }


def _asked_documents(plan: TrainingPlan) -> dict[str, int]:
    """The numbers of documents that the user gave in place of the protocol's."""
    asked = {"train_docs": plan.train_docs, "selection_docs": plan.selection_docs}
    return {name: number for name, number in asked.items() if number is not None}


# Arguments that say where and in which batches the model runs.
_NOT_OF_THE_MODEL = ("batch_size", "max_batch_size", "revision")


def plain(value: Any) -> Any:
    """A model argument as JSON has it: objects, such as a dtype, by their names."""
    return value if isinstance(value, str | int | float | bool | None) else str(value).removeprefix("torch.")


def _versions() -> dict[str, str]:
    packages = ("lm-eval-aft", "torch", "transformers", "lm-eval", "datasets")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def _tasks(prepared: Prepared) -> dict[str, Any]:
    """What was trained on. With several tasks, ``num_fewshot`` is their common number, and ``tasks`` has each
    one's own; their selection scores are in ``selection``, under the baseline's and the vector's ``tasks``.
    """
    parts, plan = prepared.parts, prepared.plan
    shots = {part.num_fewshot for part in parts}
    found: dict[str, Any] = {
        "task": ",".join(part.name for part in parts),
        **({"task_spec": plan.task} if plan.tasks != [part.name for part in parts] else {}),
        "task_version": ",".join(str(part.splits.extractor.task.VERSION) for part in parts),
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
    }
    if len(parts) > 1:
        found["tasks"] = [
            {
                "task": part.name,
                "task_version": str(part.splits.extractor.task.VERSION),
                "num_fewshot": part.num_fewshot,
                "metric": part.objective.metric,
                "splits": {
                    **part.splits.counts,
                    "train": len(part.splits.train(plan.first_seed)),
                    "selection_sha256": part.splits.selection_digest,
                },
            }
            for part in parts
        ]
    return found


def _layer(result: LayerResult, sweep: SweepResult) -> dict[str, Any]:
    """A layer's outcome on the scale of the whole selection split.

    Layers that left the search early were scored on fewer documents: their difference from the baseline
    there is added to the baseline's score on all documents.
    """
    accuracy = sweep.baseline.accuracy + result.accuracy - result.baseline.accuracy
    return {
        "score": sweep.baseline.score + result.change,
        "accuracy": min(1.0, max(0.0, accuracy)),
        "stage": result.stage,
        "n": result.baseline.n,
    }


# The model card (README.md) of a vector folder.

_BODY = """\
# {title}

A steering vector for [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness):
{numbers}, added to the residual stream of `{model}` at the output of block
{layer} (of {depth}, counted from 0){tokens}. {origin}{control}

```
{command}
```
{results}{section}"""

_SELECTION = """
## Selection split

These scores chose the layer and the {what}, so they flatter the vector: **they are not results**.
Score the evaluation split with the command above. Cross-entropy in nats after fitting one
temperature; mean over {seeds} seed(s); {n} documents, fewer for layers that left the search early.

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
            `lm_eval_aft.evaluation.render.card_results` gives them. They go into the card's ``model-index``
            and into ``.eval_results``, where the Hub looks for them; selection scores go into neither.
    """
    meta = vector.metadata
    tasks = task_names(meta)
    data = ModelCardData(
        library_name="lm-eval-aft",
        base_model=_model(meta) if _is_hub_name(_model(meta)) else None,
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
    _write_entries(folder / RESULTS, results)


def _eval_result(result: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name=result["task"],
        dataset_type=result["dataset"] or result["task"],
        dataset_name=result["task"],
        dataset_config=result.get("config") or None,
        dataset_split=result.get("split") or None,
        dataset_args={"num_fewshot": result["num_fewshot"]},
        metric_type=result["metric"],
        metric_name=f"{result['metric']} ({result['num_fewshot']}-shot)",
        metric_value=result["value"],
        metric_args=result.get("against"),
        source_name="lm-evaluation-harness",
        source_url="https://github.com/EleutherAI/lm-evaluation-harness",
    )


def _write_entries(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """The results on datasets of the Hub, as its pages of models and benchmarks read them; none: no file."""
    entries = [
        EvalResultEntry(
            dataset_id=result["dataset"],
            task_id=result.get("config") or "default",
            value=result["value"],
            notes=f"{result['metric']}, {result['num_fewshot']}-shot, lm-eval task {result['task']}; "
            f"steered by this vector, the base model alone: {result['baseline']}",
        )
        for result in results
        if _is_hub_name(result["dataset"])
    ]
    path.unlink(missing_ok=True)
    if entries:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


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
        command=vector_command(meta, "FOLDER"),
        control=f"\n\n**This is a placebo (`{control}`), not a vector to use.**" if control else "",
        section=_selection_section(vector) + _rounds_section(meta) or _recipe_section(meta),
    )


def _numbers(vector: SteeringVector) -> str:
    count = sum(tensor.numel() for tensor in vector.tensors.values())
    told = (
        f"{count} numbers"
        if vector.method == "static"
        else (f"{count:,} numbers (method `{vector.method}`: {METHODS[vector.method].formula})")
    )
    share = vector.share()
    aside = "" if share is None else f", {100 * share:.3g} % of the median residual norm there"
    return f"{told} of norm {vector.norm():.4g}{aside}"


def _origin(meta: dict[str, Any]) -> str:
    if meta.get("recipe"):
        return "Composed of other vectors, not trained: see its recipe."
    if not (meta.get("splits") and meta.get("task")):
        return "How it was made is not recorded."
    tasks, shots = task_names(meta), meta.get("num_fewshot")
    named = ", ".join(f"`{task}`" for task in tasks)
    note = f"\n\n{meta['metric_note']}" if meta.get("metric_note") else ""
    return (
        f"Trained on the training split{'s' * (len(tasks) > 1)} of {named}\n"
        f"({'each with its own number of examples' if shots is None else f'{shots}-shot'}, objective "
        f"`{meta.get('objective')}`, {meta['splits'].get('train')} documents).{note}"
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
    protocol = vector.metadata.get("protocol") or {}
    what = "length" if protocol.get("lengths") else "epoch"
    return _SELECTION.format(what=what, seeds=protocol.get("seeds"), n=baseline["n"], rows="\n".join(rows))


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
    return command_name(str((meta.get("base_model") or {}).get("name") or ""))


def _is_hub_name(name: str | None) -> bool:
    """Whether the Hub could know it; a local path is not such a name."""
    return bool(name) and str(name).count("/") <= 1 and not str(name).startswith((".", "/"))


# ``sweep.png``: every layer's result, and the finalists' scores by epoch.

_CHOSEN, _OTHER, _BASELINE = "#c2410c", "#1d4ed8", "#6b7280"
_WIDTH_95 = 1.96  # standard errors on either side of a mean in a normal 95 % interval


def draw_sweep(sweep: SweepResult, metric: str, path: Path) -> None:
    """Plot a sweep: selection score and accuracy by layer, and the finalists' curves.

    Bars are 95 % intervals over selection documents (normal approximation), of the best epoch of the
    median seed; they do not account for selection.

    Raises:
        AFTError: the file cannot be written.
    """
    # Not pyplot, which looks for a display and keeps every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    scores, accuracies, curves = figure.subplots(1, 3)
    _by_layer(scores, sweep, "score")
    scores.set(ylabel="cross-entropy (nats), lower is better", title="Selection score by layer")
    _by_layer(accuracies, sweep, "accuracy")
    accuracies.set(
        ylabel="mean of acc and acc_norm" if metric == "both" else metric, title="Selection accuracy by layer"
    )
    _curves(curves, sweep)
    figure.suptitle(
        f"{sweep.baseline.n} selection documents of the training split: these chose the vector, "
        "so they are not results",
        fontsize=9,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _by_layer(axes: Any, sweep: SweepResult, quantity: str) -> None:
    baseline = getattr(sweep.baseline, quantity)
    axes.axhline(baseline, color=_BASELINE, linestyle="--", linewidth=1, label="baseline")
    for result in sweep.layers:
        # Layers that left early were scored on fewer documents: drawn as differences from the baseline there.
        value = baseline + getattr(result, quantity) - getattr(result.baseline, quantity)
        chosen = result.layer == sweep.chosen.layer
        axes.errorbar(
            result.layer,
            value,
            yerr=_WIDTH_95 * _stderr(result, quantity),
            fmt="o",
            markersize=5,
            capsize=2,
            color=_CHOSEN if chosen else _OTHER,
            markerfacecolor="white" if result.baseline.n < sweep.baseline.n else None,
            label="chosen" if chosen else None,
        )
    axes.set_xlabel("layer (hollow: left the search early)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)


def _curves(axes: Any, sweep: SweepResult) -> None:
    axes.axhline(sweep.baseline.score, color=_BASELINE, linestyle="--", linewidth=1, label="baseline")
    for result in sweep.layers:
        for candidate in result.candidates:
            if candidate.stage in ("search", "penalty"):
                continue
            chosen = candidate is sweep.finalist
            axes.plot(
                range(1, candidate.epoch + 1),
                [score.score for score in candidate.scores],
                marker=".",
                color=_CHOSEN if chosen else _OTHER,
                alpha=1.0 if chosen else 0.5,
                label=f"layer {candidate.layer}, seed {candidate.seed}" if chosen else None,
            )
    axes.set(xlabel="epoch", ylabel="cross-entropy (nats)", title="The finalists' epochs")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)


def _stderr(result: LayerResult, quantity: str) -> float:
    middle = median_seed(result.candidates)
    best = middle.criterion.best(middle.scores)
    if quantity == "score":
        return best.stderr
    return float((best.accuracy * (1 - best.accuracy) / max(best.n, 1)) ** 0.5)


# ``training.html``: the search, how reliable it is, and what the vector promotes.

SHOWN = 20  # tokens of either kind


def training_page(
    vector: SteeringVector,
    finalists: Mapping[int, SteeringVector],
    ledger: Sequence[Mapping[str, Any]],
    promoted: RenderedTable,
) -> str:
    """A run's page, from nothing that differs between a run and the same one resumed, such as times.

    Args:
        finalists: the vectors of all seeds.
        ledger: the lines of ``training.jsonl``.
        promoted: see `promoted_tokens`.
    """
    meta = vector.metadata
    protocol, selection, splits = meta["protocol"], meta["selection"], meta["splits"]
    tried = {line["candidate"] for line in ledger if line["event"] in ("trial", "epoch")}
    failed = f"A negative result: {protocol['pruned']}." if protocol["pruned"] else None
    facts = {
        "base model": _model(meta) or None,
        "task": ", ".join(task_names(meta)),
        **{name: meta.get(name) for name in ("num_fewshot", "objective", "metric", "control", "dtype")},
        "method": vector.method,
        "positions": vector.positions,
        "coefficient": vector.coefficient,
        "protocol": protocol["name"],
        "training documents": splits["train"],
        "selection documents": selection["baseline"]["n"],
        "seed": meta["seed"],
        "vector sha256": vector.digest(),
    }
    report = {
        "title": _title(meta),
        "version": meta["versions"]["lm-eval-aft"],
        "command": vector_command(meta, "FOLDER", "RESULTS"),
        "control": meta["control"],
        "notes": [note for note in (meta.get("metric_note"), failed) if note],
        "baseline": selection["baseline"],
        "cards": _cards(vector, len(tried)),
        "charts": _charts(vector, ledger),
        "layers": layer_table(vector),
        "reliability": _reliability(vector, finalists),
        "seeds": _seed_table(finalists),
        "promoted": promoted,
        "steered": ", ".join(map(str, vector.layers)),
        "facts": facts,
    }
    return render_template("lm_eval_aft.training", "training.html.j2", report=report)


def _by_number(layers: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """Layers of a header in order: a file has them in that of their names, 10 before 2."""
    return sorted(((int(layer), each) for layer, each in layers.items()), key=itemgetter(0))


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _cards(vector: SteeringVector, tried: int) -> list[dict[str, str]]:
    meta, share = vector.metadata, vector.share()
    before, after = meta["selection"]["baseline"], meta["selection"]["vector"]
    named = ", ".join(map(str, vector.layers))
    length = f"norm {vector.norm():.4g}"
    length += "" if share is None else f", {100 * share:.3g} % of the median residual norm there"
    return [
        {
            "name": "Layer" + "s" * (len(vector.layers) > 1),
            "value": named if len(vector.layers) < 4 else f"{len(vector.layers)} layers",
            "told": f"of {meta['num_hidden_layers']}, counted from 0; {length}",
        },
        {
            "name": "Selection cross-entropy",
            "value": _signed(after["score"] - before["score"], 4),
            "told": f"{before['score']:.4f} → {after['score']:.4f} nats",
        },
        {
            "name": "Selection accuracy",
            "value": f"{_signed(100 * (after['accuracy'] - before['accuracy']), 1)} points",
            "told": f"{before['accuracy']:.1%} → {after['accuracy']:.1%}",
        },
        {
            "name": "Chosen from",
            "value": str(tried),
            "told": "vectors scored" if meta["protocol"].get("lengths") else "candidates trained",
        },
    ]


def _charts(vector: SteeringVector, ledger: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    meta = vector.metadata
    layers = [
        {"layer": layer, "score": each["score"], "chosen": layer in vector.layers}
        for layer, each in _by_number(meta["selection"]["layers"])
    ]
    own = {"layers": layers, "baseline": meta["selection"]["baseline"], "curves": _epochs(vector, ledger)}
    found = []
    if drawn := _search_map(vector, ledger):
        found.append(drawn)
    if len(layers) > 1:
        told = (
            "selection cross-entropy, nats; lower is better. Large dot: chosen; layers that left the search "
            "early were scored on fewer documents, which flatters some"
        )
        found.append({"name": "By layer", "told": told, "svg": layer_curve(own)})
    halves = meta["protocol"].get("halves_cosine") or {}
    if len({name.partition(" ")[0] for name in halves}) > 1:
        lines: dict[str, list[tuple[float, float]]] = {}
        for name, cosine in halves.items():
            layer, _, positions = name.partition(" ")
            lines.setdefault(positions, []).append((int(layer), cosine))
        lines = {positions: sorted(line) for positions, line in lines.items()}
        own_line = lines.get(vector.positions, [])
        series = [
            (line, "curve good" if positions == vector.positions else "curve faint", True)
            for positions, line in lines.items()
        ]
        marks = [point for point in own_line if point[0] in vector.layers]
        told = "cosine of the gradients of two halves of the training documents, by layer; 1: they agree"
        svg = line_chart(series, marks, None, "layer", "Agreement of the halves by layer", whole=True)
        found.append({"name": "Split halves", "told": told, "svg": svg})
    if any(len(curve["points"]) > 1 for curve in own["curves"]):
        told = "selection cross-entropy of the finalists by epoch; the chosen one stands out"
        found.append({"name": "Epochs", "told": told, "svg": training_curves(own)})
    return found


def _epochs(vector: SteeringVector, ledger: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The finalists' scores by epoch, as `training_curves` takes them."""
    curves: dict[str, dict[str, Any]] = {}
    for line in ledger:
        if line["event"] == "epoch" and line["stage"] not in ("search", "penalty"):
            chosen = line["layer"] in vector.layers and line["seed"] == vector.metadata["seed"]
            curve = curves.setdefault(line["candidate"], {"chosen": chosen, "points": []})
            curve["points"].append({"epoch": line["epoch"], "score": line["score"]})
    return list(curves.values())


def _search_map(vector: SteeringVector, ledger: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """What was found at each layer with each length, or each learning rate.

    A cell has the best vector there, of those scored on most documents.
    """
    protocol = vector.metadata["protocol"]
    grid = sorted(protocol.get("lengths") or ())
    scored = [line for line in ledger if line["event"] == ("trial" if grid else "epoch")]
    if not scored:
        return None
    rows = sorted({line["layer"] for line in scored})

    def place(share: float) -> int:
        return min(range(len(grid)), key=lambda k: abs(math.log(grid[k] / max(share, 1e-30))))

    chosen: int | None
    if grid:
        places = [place(line["share"]) for line in scored]
        first, last = min(places), max(places)
        places = [each - first for each in places]
        columns = [f"{100 * length:.3g}" for length in grid[first : last + 1]]
        chosen = place(protocol["chosen"]["share"]) - first
        axis, by = "length, % of the median residual norm", "length"
    else:
        rates = sorted({line["lr"] for line in scored}, key=lambda rate: float(str(rate).removesuffix("r")))
        places = [rates.index(line["lr"]) for line in scored]
        columns = [rate_text(rate) for rate in rates]
        chosen = rates.index(lr) if (lr := protocol["chosen"].get("lr")) in rates else None
        axis, by = "learning rate", "learning rate"
    best: dict[tuple[int, int], tuple[int, float]] = {}
    for line, column in zip(scored, places, strict=True):
        key, value = (rows.index(line["layer"]), column), (-line["n"], line["score"] - line["baseline"])
        best[key] = min(best.get(key, value), value)
    cells = {
        (i, j): (change, f"layer {rows[i]}, {by} {columns[j]}: {_signed(change, 4)} nats, {-n} documents")
        for (i, j), (n, change) in best.items()
    }
    layer = protocol["chosen"].get("layer", min(vector.layers))
    frame = (rows.index(layer), chosen) if layer in rows and chosen is not None else None
    told = (
        f"change in selection cross-entropy by layer and {by}, nats: green is better than no vector, red "
        "worse. Frame: chosen. Early rounds score few documents, which is noisier"
    )
    if len({line.get("positions") for line in scored}) > 1:
        told += "; each cell is of the positions that did best there"
    svg = heat_map(
        [str(row) for row in rows], columns, cells, frame, ("layer", axis), f"Changes by layer and {by}"
    )
    return {"name": "Search", "told": told, "svg": svg}


def layer_table(vector: SteeringVector) -> RenderedTable:
    """Every layer's selection scores, which chose the vector and are not results."""
    selection = vector.metadata["selection"]
    before = selection["baseline"]
    lines = [("no vector", f"{before['score']:.4f}", "", f"{before['accuracy']:.1%}", str(before["n"]), "")]
    tones = [""]
    for layer, each in _by_number(selection["layers"]):
        chosen = layer in vector.layers
        change = _signed(each["score"] - before["score"], 4)
        numbers = (f"{each['score']:.4f}", change, f"{each['accuracy']:.1%}", str(each["n"]), each["stage"])
        lines.append((f"{layer} (chosen)" if chosen else str(layer), *numbers))
        tones.append("primary none" if chosen else "")
    columns = ("layer", "cross-entropy", "change", "accuracy", "documents", "stage reached")
    told = (
        "Selection documents, mean over seeds: these numbers chose the vector and are not results. "
        "Layers that left the search early were scored on fewer: their difference there is added to the "
        "score of no vector on all."
    )
    return RenderedTable("Every layer", columns, lines, told, tones=tones)


def _reliability(vector: SteeringVector, finalists: Mapping[int, SteeringVector]) -> list[str]:
    halves = vector.metadata["protocol"].get("halves_cosine") or {}
    own = halves.get(f"{min(vector.layers)} {vector.positions}")
    found = []
    if own is not None:
        found.append(
            f"Halves of the training documents, which share none, agree with cosine {_signed(own)} on the "
            "direction here. Near 0, the direction is mostly noise: more documents help."
        )
    if len(finalists) == 1:
        found.append("One seed: with --seeds 3 this page shows how well the seeds' vectors agree.")
    found.append(
        "What chance does: aft eval --placebo random:3, and a vector trained with --control shuffled."
    )
    return found


def _seed_table(finalists: Mapping[int, SteeringVector]) -> RenderedTable:
    flat = {
        seed: torch.cat([values.flatten() for values in each.tensors.values()])
        for seed, each in sorted(finalists.items())
    }
    lines = [
        (f"seed {a}", *(_signed(float(torch.cosine_similarity(x, y, dim=0)), 3) for y in flat.values()))
        for a, x in flat.items()
    ]
    columns = ("", *(f"seed {seed}" for seed in flat))
    told = "Each seed draws its training documents and their order."
    return RenderedTable("Cosines of the seeds' vectors", columns, lines if len(flat) > 1 else [], told)


@torch.no_grad()
def promoted_tokens(model: Any, tokenizer: Any, backbone: Backbone, vector: SteeringVector) -> RenderedTable:
    """The tokens that a vector makes likelier and less likely by the direct way to the logits.

    That is the logit lens (nostalgebraist 2020) on the vector: the final norm without its bias, then the
    output matrix. Without lines where the model or the method does not allow it; ``intro`` says why.
    """
    columns = ("up", "", "down", "")
    head = model.get_output_embeddings()
    weight, norm = getattr(head, "weight", None), final_norm(model, backbone)
    why = ""
    if not METHODS[vector.method].constant:
        why = f"The method {vector.method!r} adds no constant vector."
    elif norm is None or weight is None or weight.shape[-1] != vector.hidden_size:
        why = "The final norm or the output matrix of this model cannot be told."
    elif weight.is_meta or not weight.is_floating_point() or any(each.is_meta for each in norm.parameters()):
        why = "The output matrix of this model is quantised or not in memory."
    if why or weight is None or norm is None:
        return RenderedTable("", columns, [], why)
    plain = copy.deepcopy(norm).to("cpu", torch.float32)
    total = torch.stack(list(vector.layers.values())).sum(0)
    passed = plain(total[None]) - plain(torch.zeros_like(total)[None])
    known = min(len(weight), len(tokenizer))
    parts = [rows.to("cpu", torch.float32) @ passed[0] for rows in weight[:known].split(2**14)]
    scores = torch.cat(parts)
    scores = (scores - scores.mean()) / scores.std().clamp(min=1e-30)
    cells = []
    for largest in (True, False):
        values, places = scores.topk(min(SHOWN, known), largest=largest)
        texts = [repr(tokenizer.decode([i])) for i in places.tolist()]
        cells.append([(text, _signed(value)) for text, value in zip(texts, values.tolist(), strict=True)])
    return RenderedTable(
        f"Top {len(cells[0])} tokens, up and down",
        columns,
        [(*up, *down) for up, down in zip(*cells, strict=True)],
    )
