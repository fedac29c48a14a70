"""What choosing on the reported documents manufactures where nothing helps: by simulation, and for real.

    OMP_NUM_THREADS=1 python scripts/selection_noise.py                     # both parts, some minutes
    OMP_NUM_THREADS=1 python scripts/selection_noise.py --simulation-only   # seconds

The simulation repeats the earlier study's way of choosing with states of a model that answer as often
right as the baseline, and differ from it by chance alone. Assumptions: whether a state is right on a
document depends on a normal number of the document's (the same for everybody: how hard it is), one that
all steered states share, one of the seed, and one of its own; a state is right where their sum lies
below the quantile that makes its accuracy the baseline's. What share of the variance is whose is in the
table: the more is common, the less there is to choose from.

The other part takes the demo's questions, draws the right options anew in all splits, so that no vector
can help, and trains every layer with three seeds for ten epochs. `biased` is the earlier study's way:
the layer with the best accuracy on the first 30 of the evaluation documents, then the best of 10 epochs
x 3 seeds on 100 of them, and that very number. The honest way chooses layer, epoch and seed on the
selection split. Both choose among the same vectors. Then the labels are drawn again many times: that
changes what is right, and nothing that either could know.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from scipy.stats import norm

from lm_eval_aft import SteeringVector
from lm_eval_aft._util.process import quiet_libraries
from lm_eval_aft.cli.options import print_table
from lm_eval_aft.evaluation.report import compare
from lm_eval_aft.evaluation.run import evaluate_pair
from lm_eval_aft.evaluation.stats import mcnemar_exact
from lm_eval_aft.harness.examples import encode
from lm_eval_aft.harness.splits import _doc_hash
from lm_eval_aft.harness.tasks import tasks_path
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.fingerprint import fingerprint
from lm_eval_aft.training.candidate import Candidate, Recipe, in_steps
from lm_eval_aft.training.objectives import Choice
from lm_eval_aft.training.recipe import TrainingPlan
from lm_eval_aft.training.selection import Score
from lm_eval_aft.training.setup import Initializer, prepare
from lm_eval_aft.training.trainer import make_engine

LAYERS, ON, EPOCHS, SEEDS, FINAL = 24, 30, 10, 3, 100  # the earlier study's numbers
TASK, METRIC = "permuted_choice", "acc"
TIE = 2e-4  # nats; in other company in a row, each log-likelihood may come out 1e-4 otherwise
Outcomes = NDArray[np.bool_]


@dataclass(frozen=True)
class Assumption:
    """Shares of variance: of the document, of all steered states, of a seed; the rest is each state's own."""

    accuracy: float
    document: float
    steered: float
    seed: float

    def draw(self, rng: np.random.Generator, seeds: int, states: int, n: int) -> tuple[Outcomes, Outcomes]:
        """Outcomes of the baseline (n,) and of steered states (seeds, states, n)."""
        document, steered = rng.standard_normal(n), rng.standard_normal(n)
        seed, own = rng.standard_normal((seeds, 1, n)), rng.standard_normal((seeds, states, n))
        parts = (self.document, self.steered, self.seed)
        rest = 1 - sum(parts)
        latent = sum(share**0.5 * each for share, each in zip(parts, (document, steered, seed), strict=True))
        latent = latent + rest**0.5 * own
        before = self.document**0.5 * document + (1 - self.document) ** 0.5 * rng.standard_normal(n)
        bar = norm.ppf(self.accuracy)
        return before < bar, latent < bar


ASSUMPTIONS = [
    Assumption(0.3, 0.0, 0.0, 0.0),
    Assumption(0.3, 0.8, 0.05, 0.05),
    Assumption(0.3, 0.3, 0.1, 0.1),
    Assumption(0.3, 0.5, 0.1, 0.1),
    Assumption(0.3, 0.5, 0.1, 0.3),
    Assumption(0.25, 0.7, 0.05, 0.1),
    Assumption(0.5, 0.7, 0.05, 0.1),
]


def simulate(assumption: Assumption, draws: int = 4000) -> dict[str, float]:
    """What choosing gives, in points, when there is nothing to choose."""
    rng = np.random.default_rng(0)
    layers, finals = [], []
    for _ in range(draws):
        before, after = assumption.draw(rng, LAYERS, 1, ON)
        layers.append(after.mean(axis=2).max() - before.mean())
        before, after = assumption.draw(rng, SEEDS, EPOCHS, FINAL)
        finals.append(after.mean(axis=2).max() - before.mean())
    positive = float(np.mean(np.array(finals) > 0))
    return {
        "best_layer": 100 * float(np.mean(layers)),
        "best_final": 100 * float(np.mean(finals)),
        "positive": positive,
        "four_of_four": positive**4,
    }


def write_task(folder: Path, documents: int) -> None:
    """The demo's multiple-choice task with the right option drawn anew for every document of every split."""
    rng = random.Random(0)
    files = {}
    for split, most in (("train", 2000), ("test", documents)):
        lines = (tasks_path() / "aft_demo" / f"aft_demo_choice_{split}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in lines.splitlines()[:most]]
        made = [
            {"question": r["question"], "options": r["options"], "gold": rng.randrange(len(r["options"]))}
            for r in rows
        ]
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(each) + "\n" for each in made), encoding="utf-8")
    config = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": "multiple_choice",
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "options",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


class Listening(Choice):
    """The objective, remembering the option preferred for each document judged last, and by how much."""

    picked: list[int]
    margins: list[float]

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        self.picked = [int(outcome[0].argmax()) for outcome in outcomes]
        self.margins = [float(np.diff(np.sort(outcome[0])[-2:])[0]) for outcome in outcomes]
        return super().summarise(outcomes)


@dataclass
class Trained:
    """Every state of every candidate on the evaluation documents, in the harness's order.

    Attributes:
        baseline: (documents,) the option preferred.
        states: (layers, seeds, epochs, documents).
        close: (layers, seeds, epochs, documents) whether the two best options are as good as equal.
        selection: (layers, seeds, epochs) scores on the selection split, lower is better.
        vectors: by (layer, seed, epoch).
        gold, options: the labels as drawn, and how many options there are, (documents,).
    """

    baseline: NDArray[np.int64]
    states: NDArray[np.int64]
    close: Outcomes
    selection: NDArray[np.float64]
    vectors: dict[tuple[int, int, int], torch.Tensor]
    gold: NDArray[np.int64]
    options: NDArray[np.int64]
    metadata: dict[str, Any]


METADATA = {
    "base_model": {"name": "demo", "revision": "main"},
    "task": TASK,
    "num_fewshot": 0,
    "objective": "choice",
    "metric": METRIC,
}


def train(lm: AFTLM, folder: Path, train_docs: int, selection_docs: int, layers: str = "all") -> Trained:
    """Every layer, three seeds, ten epochs; nothing is chosen yet."""
    plan = TrainingPlan.of(
        TASK, "maximum", metric=METRIC, include_path=(str(folder),), lr=1e-2, l2=0.0, batch_size=4,
        train_docs=train_docs, selection_docs=selection_docs, seeds=SEEDS, layers=layers,
    )  # fmt: skip
    prepared = prepare(lm, plan)
    extractor = prepared.splits.extractor  # type: ignore[union-attr]
    docs = list(extractor.task.eval_docs)
    examples = [extractor.example(doc, i) for i, doc in enumerate(docs)]
    encoded = encode([each for each in examples if each is not None], lm)
    selection = encode(prepared.splits.selection, lm)
    training = {seed: encode(prepared.splits.train(seed), lm) for seed in range(SEEDS)}
    objective = Listening(METRIC)
    engine, _ = make_engine(lm.model, prepared.backbone, objective, selection)
    # The engine judges long documents first: in that order from the start, and put back afterwards.
    packed = getattr(engine, "packed", True)
    order = sorted(range(len(encoded)), key=lambda i: -encoded[i].tokens(packed))
    evaluation = [encoded[i] for i in order]
    starts = Initializer(prepared, training, [])

    def in_order(values: Sequence[float]) -> NDArray[Any]:
        found = np.zeros(len(order), dtype=np.asarray(values).dtype)
        found[order] = values
        return found

    engine.baseline(evaluation, nothing)
    baseline = in_order(objective.picked)
    shape = (len(prepared.layers), SEEDS, EPOCHS)
    states, scores = np.zeros((*shape, len(encoded)), dtype=np.int64), np.zeros(shape)
    close = np.zeros(states.shape, dtype=bool)
    vectors = {}
    for seed in range(SEEDS):
        recipe = Recipe(lr=1e-2, clip=1.0)
        group = [Candidate(layer, seed, recipe, starts(layer, seed)) for layer in prepared.layers]
        for epoch in range(EPOCHS):
            documents = list(training[seed])
            random.Random(f"{seed}|{epoch}").shuffle(documents)
            engine.train(group, list(in_steps(documents, 4)), nothing)
            for place, candidate in enumerate(group):
                scores[place, seed, epoch] = engine.evaluate([candidate], selection, nothing)[0].score
                engine.evaluate([candidate], evaluation, nothing)
                states[place, seed, epoch] = in_order(objective.picked)
                close[place, seed, epoch] = in_order(objective.margins) < TIE
                vectors[place, seed, epoch] = candidate.vector.detach().clone()
            click.echo(f"seed {seed}, epoch {epoch + 1} of {EPOCHS}", err=True)
    metadata = {
        **METADATA,
        "fingerprint": fingerprint(lm.model, lm.tokenizer),
        "documents": [_doc_hash(doc)[:16] for doc in docs],
        "selection_documents": list(prepared.splits.selection_documents),
    }
    gold = np.array([each.gold[0] for each in encoded])
    return Trained(
        baseline, states, close, scores, vectors, gold, np.array([len(e.pairs) for e in encoded]), metadata
    )


def nothing(_done: int) -> None:
    pass


Place = tuple[int, int, int]


def chosen_honestly(trained: Trained) -> Place:
    """On the selection split: the layer by the mean over seeds, the median seed, its best epoch."""
    best = trained.selection.min(axis=2)
    layer = int(best.mean(axis=1).argmin())
    seed = int(np.argsort(best[layer])[SEEDS // 2])
    return layer, seed, int(trained.selection[layer, seed].argmin())


def chosen_biased(right: Outcomes) -> Place:
    """On the documents reported: the layer on the first of them, then epoch and seed on all, by accuracy."""
    layer = int(right[:, 0, :3, :ON].mean(axis=2).max(axis=1).argmax())
    seed, epoch = np.unravel_index(int(right[layer].mean(axis=2).argmax()), right.shape[1:3])
    return layer, int(seed), int(epoch)


def redraw(trained: Trained, draws: int) -> dict[str, dict[str, float]]:
    """Both ways of choosing under labels and evaluation documents drawn again and again."""
    rng = np.random.default_rng(0)
    honest = chosen_honestly(trained)
    found: dict[str, list[tuple[float, float]]] = {"biased": [], "honest": []}
    for _ in range(draws):
        some = rng.permutation(len(trained.baseline))[:FINAL]
        gold = (rng.random(FINAL) * trained.options[some]).astype(np.int64)
        before, after = trained.baseline[some] == gold, trained.states[..., some] == gold
        for name, place in (("biased", chosen_biased(after)), ("honest", honest)):
            steered = after[place]
            p = mcnemar_exact(int((steered & ~before).sum()), int((before & ~steered).sum()))
            found[name].append((float(steered.mean() - before.mean()), p))
    return {
        name: {
            "mean_gain": 100 * float(np.mean([gain for gain, _ in each])),
            "positive": float(np.mean([gain > 0 for gain, _ in each])),
            "p_below_0.05": float(np.mean([p < 0.05 for _, p in each])),
        }
        for name, each in found.items()
    }


def reported(trained: Trained, folder: Path) -> list[dict[str, Any]]:
    """Both vectors scored by lm-eval on the first documents, and what `aft report` says of them."""
    right = trained.states[..., :FINAL] == trained.gold[:FINAL]
    places = {"biased": chosen_biased(right), "honest": chosen_honestly(trained)}
    for name, place in places.items():
        meta = dict(trained.metadata)
        documents = {"biased": meta.pop("documents")[:FINAL], "honest": meta.pop("selection_documents")}[name]
        protocol = {"name": name, "biased": name == "biased", "epochs": EPOCHS, "seeds": SEEDS}
        meta |= {"protocol": protocol, "splits": {"selection_documents": documents}, "seed": place[1]}
        SteeringVector({place[0]: trained.vectors[place]}, metadata=meta).save(folder / name)
    output = folder / "results"
    specs = [str(folder / name) for name in places]
    evaluate_pair(
        "demo", specs, [TASK], output, model_args={"device": "cpu"},
        flags=["--limit", str(FINAL), "--include_path", str(folder), "--batch_size", "32"],
    )  # fmt: skip
    rows = []
    for row in compare(output).rows:
        name = row.run.removeprefix("steered/")
        expected, ties = float(right[places[name]].mean()), int(trained.close[places[name]][:FINAL].sum())
        if abs(row.steered - expected) > ties / FINAL + 1e-9:
            raise click.ClickException(
                f"lm-eval scores {name} at {row.steered}, the engine at {expected}, with {ties} near ties."
            )
        rows.append(
            {"vector": name, "difference": 100 * row.difference, "p": row.p_value, "verdict": row.verdict}
        )
    return rows


@click.command()
@click.option("--simulation-only", is_flag=True)
@click.option("--documents", default=200, show_default=True, help="Evaluation documents of the demo.")
@click.option("--train-docs", default=50, show_default=True)
@click.option("--selection-docs", default=100, show_default=True)
@click.option("--layers", default="all", show_default=True, help="Of the demo model.")
@click.option("--draws", default=2000, show_default=True, help="Redrawn labels.")
@click.option("--simulations", default=4000, show_default=True)
def main(
    simulation_only: bool,
    documents: int,
    train_docs: int,
    selection_docs: int,
    layers: str,
    draws: int,
    simulations: int,
) -> None:
    """What choosing on the reported documents manufactures."""
    quiet_libraries()
    lines = []
    for each in ASSUMPTIONS:
        lines.append({**vars(each), **simulate(each, simulations)})
    rows = [
        (
            f"{x['accuracy']:.0%}", f"{x['document']:.2f}", f"{x['steered']:.2f}", f"{x['seed']:.2f}",
            f"{x['best_layer']:+.1f}", f"{x['best_final']:+.1f}", f"{x['positive']:.0%}",
            f"{x['four_of_four']:.0%}",
        )
        for x in lines
    ]  # fmt: skip
    columns = ("accuracy", "document", "steered", "seed", f"best of {LAYERS} layers, n = {ON}")
    columns += (f"best of {EPOCHS} epochs x {SEEDS} seeds, n = {FINAL}", "positive", "4 of 4 positive")
    print_table("No effect at all (simulated): points above the baseline", columns, rows)
    result: dict[str, Any] = {"simulated": lines}
    if not simulation_only:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_task(folder, documents)
            lm = AFTLM("demo", device="cpu", batch_size=32)
            trained = train(lm, folder, train_docs, selection_docs, layers)
            result["redrawn"] = redraw(trained, draws)
            result["reported"] = reported(trained, folder)
        rows = [
            (way, f"{x['mean_gain']:+.1f}", f"{x['positive']:.0%}", f"{x['p_below_0.05']:.1%}")
            for way, x in result["redrawn"].items()
        ]
        title = f"Permuted labels, demo model: {draws} draws of labels and of {FINAL} documents"
        print_table(title, ("chosen", "mean gain in points", "positive", "McNemar p < 0.05"), rows)
        rows = [
            (x["vector"], f"{x['difference']:+.1f}", f"{x['p']:.3f}", x["verdict"])
            for x in result["reported"]
        ]
        print_table("What aft report says of one such pair", ("vector", "points", "p", "verdict"), rows)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
