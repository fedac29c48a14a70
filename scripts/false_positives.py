"""How often a vector of the protocol ``onepass`` is called better where none can help.

    OMP_NUM_THREADS=1 python scripts/false_positives.py --output demo.jsonl
    OMP_NUM_THREADS=1 python scripts/false_positives.py --model MODEL --task arc_easy --draws 20 \\
        --train-docs 100 --selection-docs 100 --limit 500 --output real.jsonl

A draw gives every document of the training, selection and evaluation splits a right option at random, then
fits a vector (pass, search, line search, refinement, with all their trials) and compares it with the baseline
on the evaluation documents by the test that `aft report` uses. ``shuffled`` draws permute the training and
selection labels only and keep the evaluation's: what they gain is real, but not the task's content. Each draw
is a line of the output; a run goes on where it was stopped. Options are scored by the training engine, which
agrees with the harness to 1e-4 nats.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from lm_eval_aft._util.files import JsonLines
from lm_eval_aft._util.process import quiet_libraries
from lm_eval_aft.cli.options import parse_model_args, print_table
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.evaluation.stats import BETTER, WORSE, compare_paired, verdict, wilson_interval
from lm_eval_aft.harness.examples import encode
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.training.candidate import Candidate, Recipe
from lm_eval_aft.training.checkpoint import RunRecorder
from lm_eval_aft.training.onepass import one_pass
from lm_eval_aft.training.recipe import TrainingPlan
from lm_eval_aft.training.setup import load_model, prepare
from lm_eval_aft.training.trainer import Trajectory, by_length, make_engine, residual_norms


def relabelled(documents: Sequence[TokenizedDocument], draw: random.Random) -> list[TokenizedDocument]:
    """The documents with a right option at random each."""
    return [replace(each, gold=(draw.randrange(len(each.pairs)),)) for each in documents]


def permuted(documents: Sequence[TokenizedDocument], draw: random.Random) -> list[TokenizedDocument]:
    """The documents with each other's labels, where they have as many options."""
    found = list(documents)
    for size in {len(each.pairs) for each in documents}:
        places = [i for i, each in enumerate(documents) if len(each.pairs) == size]
        labels = [documents[i].gold for i in places]
        draw.shuffle(labels)
        for i, label in zip(places, labels, strict=True):
            found[i] = replace(documents[i], gold=label)
    return found


def quiet(_done: int, /) -> None:
    pass


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--model-args", help="Arguments of lm-eval's hf model: dtype=...,gguf_file=...")
@click.option("--task", default="aft_demo_choice", show_default=True)
@click.option("--draws", default=200, show_default=True)
@click.option("--train-docs", default=500, show_default=True)
@click.option("--selection-docs", default=500, show_default=True)
@click.option("--limit", type=int, help="Evaluation documents.  [default: all]")
@click.option("--kind", type=click.Choice(["null", "shuffled"]), default="null", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A line for every draw.")
def main(
    model: str,
    model_args: str | None,
    task: str,
    draws: int,
    train_docs: int,
    selection_docs: int,
    limit: int | None,
    kind: str,
    output: Path,
) -> None:
    """Count the vectors called better."""
    quiet_libraries()
    plan = TrainingPlan.of(task, "onepass", train_docs=train_docs, selection_docs=selection_docs)
    prepared = prepare(load_model(model, parse_model_args(model_args)), plan)
    extractor = prepared.parts[0].splits.extractor
    examples = [extractor.example(doc, i) for i, doc in enumerate(list(extractor.task.eval_docs)[:limit])]
    evaluation = encode([each for each in examples if each is not None], prepared.lm)
    selection = encode(prepared.splits.selection, prepared.lm)
    train = encode(prepared.splits.train(0), prepared.lm)
    engine, _ = make_engine(prepared.lm.model, prepared.backbone, prepared.objective, [*selection, *train])
    assert isinstance(engine, Trajectory)
    norms = residual_norms(prepared.lm.model, prepared.backbone, prepared.layers, selection)
    evaluation = by_length(evaluation, engine.packed)  # the order in which outcomes come

    def picked(candidate: Candidate) -> Any:
        (outcomes,) = engine.outcomes([candidate], evaluation, quiet)
        return np.array([each[0].argmax() for each in outcomes])

    depth, width = len(prepared.backbone.blocks), prepared.backbone.hidden_size
    zero = Intervention.static(depth - 1, torch.zeros(width))
    before = picked(Candidate(depth - 1, 0, Recipe(), zero))
    ledger = JsonLines(output)
    lines = ledger.read()
    for number in tqdm(range(len(lines), draws), initial=len(lines), total=draws, unit="vector"):
        draw = random.Random(number)
        changed = {"null": relabelled, "shuffled": permuted}[kind]
        tried = one_pass(
            prepared,
            engine,
            seeds=[0],
            train={0: changed(train, draw)},
            selection=changed(selection, draw),
            norms=norms,
            events=RunRecorder(tqdm(disable=True), None, {}, None, {}),
        ).run()
        labels = [each.gold for each in (relabelled(evaluation, draw) if kind == "null" else evaluation)]
        tensors = {name: each.clone() for name, each in (tried.finalist.best or {}).items()}
        vector = replace(tried.finalist.intervention, tensors=tensors)
        after = picked(Candidate(tried.finalist.layer, 0, Recipe(), vector))
        right = [
            [float(pick in gold) for pick, gold in zip(own, labels, strict=True)] for own in (before, after)
        ]
        found = compare_paired(*right)
        ledger.append(
            draw=number,
            layer=tried.finalist.layer,
            share=tried.finalist.chosen["share"],
            trials=tried.notes["trials"],
            selection_change=tried.chosen.change,
            n=found.n,
            difference=found.difference,
            p=found.p_value,
            verdict=verdict(found.p_value, found.difference),
        )
    lines = ledger.read()[:draws]
    counts = {name: sum(line["verdict"] == name for line in lines) for name in (BETTER, WORSE)}
    rows = [
        (
            name,
            f"{count} of {len(lines)}",
            *(f"{100 * each:.1f} %" for each in wilson_interval(count, len(lines))),
        )
        for name, count in counts.items()
    ]
    title = f"{kind}: mean difference {100 * np.mean([line['difference'] for line in lines]):+.2f} points"
    print_table(title, ("verdict", "vectors", "at least", "at most"), rows)
    print(json.dumps({"better": counts[BETTER] / len(lines), "worse": counts[WORSE] / len(lines)}))


if __name__ == "__main__":
    main()
