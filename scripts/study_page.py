"""Tables and pictures of docs/study.md, from what `aft bench` and `study_rows.py` left.

    python scripts/study_page.py collect real docs/study/real      # a study's folder without its samples
    python scripts/study_page.py write                             # docs/study.md's tables, and the pictures

`docs/study/real` and `docs/study/sizes` are the studies, `docs/study/rows` the rows beside them. Figures are
those of the ledgers; means over seeds with their intervals and Holm's correction are computed here.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lm_eval_aft import load_vector
from lm_eval_aft.evaluation import formatting
from lm_eval_aft.evaluation.stats import holm, seeds_interval
from lm_eval_aft.studies.config import BenchStudy, read_bench_study
from lm_eval_aft.studies.jobs import STUDY_LEDGER, StudyLedger

DOCS = Path(__file__).parents[1] / "docs"
STUDY = DOCS / "study"
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct",
    "gemma-3": "Gemma-3-270m",
    "qwen2.5-coder": "Qwen2.5-Coder-0.5B-Instruct",
}
CONTROLS = ("random", "shuffled")
METHODS = ("static", "all-layers", "drab", "drab-strong", "mlp", "caa", *CONTROLS)


def without_folders(text: str) -> str:
    """The text with models named by their folder's name alone, wherever it lay on the machine that ran it."""
    names = "|".join(re.escape(Path(each.pretrained).name) for each in _study("real.yaml").models)
    return re.sub(rf"(?<![\w.])/(?:[\w.+-]+/)+(?=(?:{names}))", "", text)


def _study(name: str) -> BenchStudy:
    return read_bench_study(Path(__file__).with_name("studies") / name)


def collected(study: Path) -> Iterator[tuple[Path, Path]]:
    """(Source, place in the collection) of a study's or its rows' files: no samples, baselines or cards."""
    for vector in sorted(study.glob("vectors/*/vector.safetensors")):
        for name in (vector.name, "training.jsonl"):
            yield vector.with_name(name), Path("vectors", vector.parent.name, name)
    for results in sorted(study.glob("scores/*/steered/**/results_*.json")):
        yield results, Path("scores", results.relative_to(study).parts[1], "results.json")
    for rows in sorted(study.glob("*/rows.json")):
        yield rows, rows.relative_to(study)


def cells(folder: Path) -> list[dict[str, Any]]:
    """The finished cells of a study, each with its primary row (in points) and its vector."""
    found = []
    for key, line in StudyLedger(folder / STUDY_LEDGER).outcomes.items():
        model, task, method, seed = line["name"].split("/")
        row = next(each for each in line["rows"] if each["primary"])
        found.append(
            {
                "model": model,
                "task": task,
                "method": method,
                "seed": int(seed.removeprefix("seed-")),
                "key": key,
            }
            | {"row": row, "vector": line["vector"], "seconds": line["seconds"]}
        )
    return found


def extra_rows(folder: Path) -> list[dict[str, Any]]:
    """LoRA, few-shot and answer-only rows, of every model and task."""
    found = []
    for file in sorted(folder.glob("*/rows.json")):
        model, _, task = file.parent.name.rpartition("-")
        for each in json.loads(file.read_text()):
            found.append({"model": model, "task": task, "method": each["row"], "seed": None, "row": each})
    return found


def points(value: float) -> str:
    """A difference of shares in percentage points."""
    return formatting.points(value, share=True)


def judged(row: dict[str, Any]) -> bool:
    """Whether a row gets a verdict: controls and answers alone do not."""
    return row["method"] not in CONTROLS and row["method"] != "answer-only"


def adjust(rows: list[dict[str, Any]]) -> None:
    """Holm's correction over everything on the page that gets a verdict."""
    family = [each for each in rows if judged(each)]
    for each, p in zip(family, holm([each["row"]["p_value"] for each in family]), strict=True):
        each["p_adjusted"] = p
        better = each["row"]["difference"] > 0
        each["verdict"] = ("better" if better else "worse") if p < 0.05 else "no detectable difference"


def rank(row: dict[str, Any]) -> tuple[int, str, int]:
    place = METHODS.index(row["method"]) if row["method"] in METHODS else len(METHODS)
    return place, row["method"], row["seed"] or 0


def main_table(rows: list[dict[str, Any]], model: str, task: str) -> str:
    """One model and task: every row against the frozen model."""
    own = sorted((each for each in rows if (each["model"], each["task"]) == (model, task)), key=rank)
    first = next(each["row"] for each in own if each["method"] != "answer-only")
    lines = [
        f"**{MODELS[model]}, {task}** ({first['metric']}, n = {first['n']:,}; frozen model "
        f"{100 * first['baseline']:.2f} %)",
        "",
        "| row | layer, length | points | 95 % interval | p (Holm) | detectable | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in own:
        row, vector = each["row"], each.get("vector") or {}
        layers = vector.get("layers") or []
        layer = "all" if len(layers) > 1 else str(layers[0]) if layers else "–"
        share = vector.get("norm_share")
        verdict = each.get("verdict") or ("control" if each["method"] in CONTROLS else "–")
        name = each["method"] + ("" if each["seed"] is None else f", seed {each['seed']}")
        place = layer if share is None else f"{layer}, {100 * share:.1f} %"
        lines.append(
            f"| {name} | {place} | **{points(row['difference'])}** | "
            f"{points(row['low'])} to {points(row['high'])} | {formatting.p_text(each.get('p_adjusted'))} | "
            f"±{100 * row['mde']:.2f} | {verdict.replace('no detectable difference', 'none detected')} |"
        )
    return "\n".join(lines)


NAMES = {
    "static": "one vector",
    "all-layers": "a vector at every layer",
    "caa": "contrastive vector (CAA)",
    "lora": "LoRA, rank 8",
    "random": "control: random direction, same search",
    "shuffled": "control: permuted labels, same search",
}


def readme_table(rows: list[dict[str, Any]], model: str = "smollm2", task: str = "arc_easy") -> str:
    """README's few rows of one model and task; several seeds as their mean."""
    own = [each for each in rows if (each["model"], each["task"]) == (model, task)]
    first = next(each["row"] for each in own if each["method"] == "static")
    lines = [f"| {first['metric']}, n = {first['n']:,} | points | 95 % interval |", "|---|---|---|"]
    shown = [each["method"] for each in own if each["method"].startswith("few-shot")]
    for method in ("static", "lora", *dict.fromkeys(shown), "caa", *CONTROLS):
        seeds = [each["row"] for each in own if each["method"] == method]
        if not seeds:
            continue
        name = NAMES.get(
            method, method.replace("few-shot (", "").replace(")", " of the documents in the prompt")
        )
        low, high = seeds[0]["low"], seeds[0]["high"]
        if len(seeds) > 2:
            low, high = over_seeds(seeds)
            name += f", mean of {len(seeds)} seeds"
        mean = points(statistics.fmean(row["difference"] for row in seeds))
        lines.append(f"| {name} | {mean} | {points(low)} to {points(high)} |")
    return "\n".join(lines)


def over_seeds(seeds: list[dict[str, Any]]) -> tuple[float, float]:
    """The 95 % interval of a mean over seeds and evaluation documents."""
    error = statistics.fmean((row["high"] - row["low"]) / 2 for row in seeds)
    return seeds_interval([row["difference"] for row in seeds], error)


def seeds_table(rows: list[dict[str, Any]]) -> str:
    """Means over three seeds, with an interval over seeds and documents."""
    lines = [
        "| model | task | row | seeds | mean, points | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for task in dict.fromkeys(each["task"] for each in rows):
            for method in METHODS:
                own = [e for e in rows if (e["model"], e["task"], e["method"]) == (model, task, method)]
                if len(own) < 3:
                    continue
                low, high = over_seeds([each["row"] for each in own])
                mean = points(statistics.fmean(each["row"]["difference"] for each in own))
                lines.append(
                    f"| {MODELS[model]} | {task} | {method} | {len(own)} | {mean} | "
                    f"{points(low)} to {points(high)} |"
                )
    return "\n".join(lines)


def sizes_table(sizes: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Gain against the number of training documents, and the earlier study's protocol."""
    lines = [
        "| model | training documents | layer | length | points | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for docs, each in by_size(sizes, rows, model):
            row, vector = each["row"], each["vector"]
            lines.append(
                f"| {MODELS[model]} | {docs} | {vector['layers'][0]} | {100 * vector['norm_share']:.1f} % | "
                f"{points(row['difference'])} | {points(row['low'])} to {points(row['high'])} |"
            )
    for each in (one for one in sizes if one["method"] in ("rapid", "every-layer")):
        row, vector = each["row"], each["vector"]
        name = (
            "50, protocol `rapid`"
            if each["method"] == "rapid"
            else "100, every layer on all selection documents"
        )
        lines.append(
            f"| {MODELS[each['model']]} | {name} | {vector['layers'][0]} | "
            f"{100 * vector['norm_share']:.1f} % | {points(row['difference'])} | "
            f"{points(row['low'])} to {points(row['high'])} |"
        )
    return "\n".join(lines)


def by_size(
    sizes: list[dict[str, Any]], rows: list[dict[str, Any]], model: str
) -> list[tuple[int, dict[str, Any]]]:
    """(training documents, cell) of a model on arc_easy, smallest first; 100 are the main study's seed 0."""
    found = [
        (int(each["method"].removeprefix("docs-")), each)
        for each in sizes
        if each["model"] == model and each["method"].startswith("docs-")
    ]
    if not found:
        return []
    found += [
        (100, each)
        for each in rows
        if (each["model"], each["task"], each["method"], each["seed"]) == (model, "arc_easy", "static", 0)
    ]
    return sorted(found, key=lambda pair: pair[0])


def layer_scores(folder: Path) -> Iterator[tuple[str, dict[int, float]]]:
    """By model: every layer's best change of the selection score, where each was judged on all documents."""
    for cell in cells(folder):
        if cell["method"] != "every-layer":
            continue
        line = StudyLedger(folder / STUDY_LEDGER).outcomes[cell["key"]]
        digest = line["vector"]["sha256"]
        trials: dict[int, float] = {}
        for file in folder.glob("vectors/*/training.jsonl"):
            if load_vector(file.parent).digest() != digest:
                continue
            for text in file.read_text().splitlines():
                each = json.loads(text)
                if each.get("event") == "trial" and each["stage"] == "search":
                    change = each["score"] - each["baseline"]
                    trials[each["layer"]] = min(change, trials.get(each["layer"], math.inf))
        yield cell["model"], trials


def hours(*studies: list[dict[str, Any]]) -> float:
    """Hours of one core that training and scoring took."""
    return sum(sum(each["seconds"].values()) for one in studies for each in one) / 3600


def pictures(rows: list[dict[str, Any]], sizes: list[dict[str, Any]]) -> None:
    """gains.png, layers.png and sizes.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pairs = list(dict.fromkeys((each["model"], each["task"]) for each in rows if each["method"] == "static"))
    sizes_of = [sum((row["model"], row["task"]) == pair for row in rows) for pair in pairs]
    figure, axes = plt.subplots(
        *(len(pairs), 1), figsize=(8, 1 + 0.3 * sum(sizes_of)), gridspec_kw={"height_ratios": sizes_of},
        squeeze=False, sharex=True, constrained_layout=True,
    )  # fmt: skip
    for axis, pair in zip(axes[:, 0], pairs, strict=True):
        own = sorted((each for each in rows if (each["model"], each["task"]) == pair), key=rank)
        for y, each in enumerate(reversed(own)):
            row = each["row"]
            colour = {"better": "#00796b", "worse": "#c62828"}.get(each.get("verdict", ""), "#888888")
            axis.plot([100 * row["low"], 100 * row["high"]], [y, y], color=colour, lw=2)
            axis.plot(100 * row["difference"], y, "o", color=colour, ms=5)
        names = [e["method"] + ("" if e["seed"] is None else f", seed {e['seed']}") for e in reversed(own)]
        axis.set_yticks(range(len(own)), names, fontsize=8)
        axis.axvline(0, color="#444444", lw=0.8)
        axis.set_title(f"{MODELS[pair[0]]}, {pair[1]} (n = {own[0]['row']['n']:,})", fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("points against the frozen model, 95 % interval")
    figure.savefig(STUDY / "gains.png", dpi=110)
    plt.close(figure)

    found = list(layer_scores(STUDY / "sizes"))
    if found:
        figure, axes = plt.subplots(1, len(found), figsize=(8, 3), squeeze=False, constrained_layout=True)
        for axis, (model, trials) in zip(axes[0], found, strict=True):
            axis.plot(
                sorted(trials), [trials[layer] for layer in sorted(trials)], "o-", color="#00796b", ms=4
            )
            axis.axhline(0, color="#444444", lw=0.8)
            axis.set_title(MODELS[model], fontsize=9, loc="left")
            axis.set_xlabel("layer")
        axes[0, 0].set_ylabel("change of selection\ncross-entropy (nats)")
        figure.savefig(STUDY / "layers.png", dpi=110)
        plt.close(figure)

    if not sizes:
        return
    figure, axis = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
    for model in MODELS:
        if pairs_of := by_size(sizes, rows, model):
            docs = [size for size, _ in pairs_of]
            values = [100 * each["row"]["difference"] for _, each in pairs_of]
            errors = [
                [100 * (e["row"]["difference"] - e["row"]["low"]) for _, e in pairs_of],
                [100 * (e["row"]["high"] - e["row"]["difference"]) for _, e in pairs_of],
            ]
            axis.errorbar(docs, values, yerr=errors, fmt="o-", capsize=3, label=MODELS[model])
    axis.set_xscale("log")
    axis.set_xlabel("training documents")
    axis.set_ylabel("points, 95 % interval")
    axis.axhline(0, color="#444444", lw=0.8)
    axis.legend(fontsize=8)
    figure.savefig(STUDY / "sizes.png", dpi=110)
    plt.close(figure)


def blocks() -> dict[str, str]:
    """The page's tables by name."""
    rows = cells(STUDY / "real")
    sizes = cells(STUDY / "sizes") if (STUDY / "sizes").is_dir() else []
    both = rows + extra_rows(STUDY / "rows")
    adjust(both)
    pairs = dict.fromkeys((each["model"], each["task"]) for each in sorted(both, key=_pair_rank))
    return {
        "readme": readme_table(both),
        "cells": "\n\n".join(main_table(both, *pair) for pair in pairs),
        "seeds": seeds_table(rows),
        "sizes": sizes_table(sizes, rows),
        "hours": f"{len(rows) + len(sizes)} cells, which took {hours(rows, sizes):.1f} hours of a busy core, "
        f"and {len(both) - len(rows)} rows beside them.",
    }


def _pair_rank(row: dict[str, Any]) -> tuple[int, int]:
    tasks = ("arc_easy", "arc_challenge", "hellaswag")
    return list(MODELS).index(row["model"]), tasks.index(row["task"])


def filled(text: str, found: dict[str, str]) -> str:
    """The page with every block between ``<!-- NAME -->`` and ``<!-- end -->`` replaced."""

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{found[match[1]]}\n<!-- end -->"

    return re.sub(
        r"<!-- (readme|cells|seeds|sizes|hours) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL
    )


@click.group()
def main() -> None:
    """Make docs/study.md's tables and pictures."""


@main.command()
@click.argument("study", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
def collect(study: Path, output: Path) -> None:
    """Copy a STUDY's folder (or the rows beside one) to OUTPUT without samples; ledgers are appended to."""
    for file, place in collected(study):
        if file.suffix == ".safetensors" and (output / place).exists():  # named by its settings: the same
            continue
        (output / place).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                facts = {key: without_folders(value) for key, value in (opened.metadata() or {}).items()}
            save_file(load_file(file), output / place, facts)
        else:
            text = file.read_text().replace(str(study.resolve()), study.name)
            (output / place).write_text(without_folders(text))
    if (ledger := study / STUDY_LEDGER).exists():
        lines = (output / STUDY_LEDGER).read_text().splitlines() if (output / STUDY_LEDGER).exists() else []
        new = [line for line in ledger.read_text().splitlines() if line not in lines]
        (output / STUDY_LEDGER).write_text("".join(f"{line}\n" for line in [*lines, *new]))


@main.command()
def write() -> None:
    """Fill docs/study.md's tables and draw its pictures."""
    found = blocks()
    for page in (DOCS / "study.md", DOCS.parent / "README.md"):
        page.write_text(filled(page.read_text(), found))
    rows = cells(STUDY / "real") + extra_rows(STUDY / "rows")
    adjust(rows)
    pictures(rows, cells(STUDY / "sizes") if (STUDY / "sizes").is_dir() else [])


if __name__ == "__main__":
    main()
