"""Objectives against straightforward numpy, and the temperature fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from lm_eval_aft import AFTError
from lm_eval_aft.packing import Batch, Document, make_batch
from lm_eval_aft.training.objectives import LM, Choice, make_objective

DOCS = [
    Document((((1, 2), (3, 4)), ((1, 2), (5,)), ((1, 2), (6, 7, 8))), (0,), (3.0, 9.0, 2.0)),
    Document((((2,), (3,)), ((2,), (4, 4))), (1,), (5.0, 5.0)),
    Document((((9, 1), (3,)), ((9, 1), (4,)), ((9, 1), (5,)), ((9, 1), (6,))), (1, 3), (1.0, 2.0, 3.0, 4.0)),
]


def logits_and_batch() -> tuple[torch.Tensor, Batch]:
    batch = make_batch(DOCS, False, torch.device("cpu"), torch.float32)
    logits = torch.randn(
        len(batch.scored), 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    # Right options are likelier than by chance, so that the best temperature is a finite one.
    golden = {sum(len(d.pairs) for d in DOCS[:i]) + g for i, d in enumerate(DOCS) for g in d.gold}
    for row, (target, option) in enumerate(zip(batch.targets.tolist(), batch.option.tolist(), strict=True)):
        logits[row, target] += 1.0 if option in golden else 0.0
    return 3 * logits, batch


def by_hand(metric: str) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """Scores per document, walking through the logits in the order of the options."""
    logits, _ = logits_and_batch()
    rows = iter(logits.log_softmax(-1).numpy())
    found = []
    for document in DOCS:
        sums = np.array([sum(next(rows)[token] for token in tail) for _, tail in document.pairs])
        if metric == "acc_norm":
            sums = sums / np.array(document.lengths) * np.mean(document.lengths)
        found.append((sums, document.gold))
    return found


def mean_loss(scores: list[tuple[np.ndarray, tuple[int, ...]]], beta: float) -> float:
    losses = []
    for values, gold in scores:
        p = np.exp(beta * values - (beta * values)[list(gold)].max())
        losses.append(-np.log(p[list(gold)].sum() / p.sum()))
    return float(np.mean(losses))


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_choice(metric: str) -> None:
    objective = Choice(metric)
    logits, batch = logits_and_batch()
    scores = by_hand(metric)
    assert float(objective.losses(logits, batch).mean()) == pytest.approx(mean_loss(scores, 1.0))
    score = objective.summarise(objective.outcomes(logits, batch))
    assert score.cross_entropy == pytest.approx(mean_loss(scores, 1.0))
    assert score.accuracy == np.mean([values.argmax() in gold for values, gold in scores])
    best = min(mean_loss(scores, beta) for beta in np.exp(np.linspace(-5, 3, 4001)))
    assert score.score == pytest.approx(best, abs=1e-4)
    assert score.score <= score.cross_entropy
    assert score.n == 3


def test_rescaled_confidence_cannot_win() -> None:
    objective = Choice("acc")
    logits, batch = logits_and_batch()
    plain = objective.outcomes(logits, batch)
    louder = [np.stack([7.5 * outcome[0], outcome[1]]) for outcome in plain]
    assert objective.summarise(louder).score == pytest.approx(objective.summarise(plain).score, abs=1e-6)
    assert objective.summarise(louder).cross_entropy != pytest.approx(
        objective.summarise(plain).cross_entropy
    )


def test_lm() -> None:
    objective = LM()
    docs = [Document((document.pairs[0],)) for document in DOCS]
    batch = make_batch(docs, False, torch.device("cpu"), torch.float32)
    logits = 2 * torch.randn(4, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    owner = [0, 0, 1, 2]
    targets = [3, 4, 3, 3]

    def loss(beta: float) -> float:
        logp = (beta * logits).log_softmax(-1).numpy()
        per_doc = [np.mean([-logp[i, targets[i]] for i in range(4) if owner[i] == d]) for d in range(3)]
        return float(np.mean(per_doc))

    assert float(objective.losses(logits, batch).mean()) == pytest.approx(loss(1.0))
    score = objective.summarise(objective.outcomes(logits, batch))
    assert score.cross_entropy == pytest.approx(loss(1.0))
    fitted = minimize_scalar(
        lambda b: loss(float(np.exp(b))), bounds=(np.log(0.25), np.log(4)), method="bounded"
    )
    assert score.score == pytest.approx(float(fitted.fun), abs=2e-3)
    hits = (logits.argmax(-1).numpy() == targets).astype(float)
    assert score.accuracy == pytest.approx(np.mean([hits[:2].mean(), hits[2], hits[3]]))


def test_metric_follows_the_task() -> None:
    assert make_objective("choice", None, ["acc", "acc_norm"]).metric == "acc_norm"
    assert make_objective("choice", None, ["acc"]).metric == "acc"
    assert make_objective("choice", "acc", ["acc", "acc_norm"]).metric == "acc"
    with pytest.raises(AFTError, match="no objective 'magic'"):
        make_objective("magic", None, [])
    with pytest.raises(AFTError, match="knows no metric"):
        make_objective("choice", "f1", [])
