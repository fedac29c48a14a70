"""Objectives against straightforward numpy, and the temperature fit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from lm_eval_aft import AFTError
from lm_eval_aft.engine.batching import Batch, TokenizedDocument, make_batch
from lm_eval_aft.training.objectives import LM, RFT, Choice, ChoiceLoss, make_objective
from lm_eval_aft.training.selection import Score, find_criterion

DOCS = [
    TokenizedDocument((((1, 2), (3, 4)), ((1, 2), (5,)), ((1, 2), (6, 7, 8))), (0,), (3.0, 9.0, 2.0)),
    TokenizedDocument((((2,), (3,)), ((2,), (4, 4))), (1,), (5.0, 5.0)),
    TokenizedDocument(
        (((9, 1), (3,)), ((9, 1), (4,)), ((9, 1), (5,)), ((9, 1), (6,))), (1, 3), (1.0, 2.0, 3.0, 4.0)
    ),
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


def token_logits(scale: float, lead: float) -> tuple[torch.Tensor, Batch]:
    """Logits of five gold tokens of three documents; the larger ``lead``, the likelier the gold ones."""
    docs = [TokenizedDocument((document.pairs[0],)) for document in (DOCS[0], DOCS[1], DOCS[2])]
    batch = make_batch(docs, False, torch.device("cpu"), torch.float32)
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits[range(4), [3, 4, 3, 3]] += lead
    return scale * logits, batch


def token_losses(logits: torch.Tensor, beta: float) -> np.ndarray:
    """Mean cross-entropy of each document's tokens (2, 1 and 1) at an inverse temperature."""
    logp = (beta * logits).log_softmax(-1).numpy()
    each = [-logp[i, token] for i, token in enumerate([3, 4, 3, 3])]
    return np.array([(each[0] + each[1]) / 2, each[2], each[3]])


@pytest.mark.parametrize(("scale", "lead"), [(2.0, 1.0), (0.7, 1.0), (1.1, 0.4), (4.0, 1.2)])
def test_lm(scale: float, lead: float) -> None:
    objective = LM()
    logits, batch = token_logits(scale, lead)
    assert objective.losses(logits, batch).tolist() == pytest.approx(token_losses(logits, 1.0).tolist())
    score = objective.summarise(objective.outcomes(logits, batch))
    assert score.cross_entropy == pytest.approx(token_losses(logits, 1.0).mean())
    fitted = minimize_scalar(
        lambda b: token_losses(logits, float(np.exp(b))).mean(),
        bounds=(np.log(0.25), np.log(4)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert (
        0.26 < np.exp(fitted.x) < 3.9
    )  # within the grid, so that the curve between its points is what is tested
    assert score.score == pytest.approx(float(fitted.fun), abs=2e-5)
    assert score.temperature == pytest.approx(float(np.exp(-fitted.x)), rel=2e-3)
    assert score.n == 3
    kept = np.exp(np.linspace(-np.log(4), np.log(4), 13))  # where documents' losses are known
    nearest = min(kept, key=lambda beta: token_losses(logits, beta).mean())
    assert score.stderr == pytest.approx(token_losses(logits, nearest).std(ddof=1) / 3**0.5)
    hits = (logits.argmax(-1).numpy() == [3, 4, 3, 3]).astype(float)
    assert score.accuracy == pytest.approx(np.mean([hits[:2].mean(), hits[2], hits[3]]))


@pytest.mark.parametrize(("lead", "temperature"), [(-3.0, 4.0), (4.0, 0.25)])
def test_lm_beyond_the_grid(lead: float, temperature: float) -> None:
    """Where confidence should fall, or rise, without end, the grid's end is taken as it is."""
    logits, batch = token_logits(2.0, lead)
    score = LM().summarise(LM().outcomes(logits, batch))
    assert score.temperature == pytest.approx(temperature)
    assert score.score == pytest.approx(token_losses(logits, 1 / temperature).mean(), rel=1e-6)
    assert score.score > 0


def test_a_diverged_candidate_scores_nan() -> None:
    logits, batch = token_logits(2.0, 1.0)
    score = LM().summarise(LM().outcomes(logits * float("nan"), batch))
    assert np.isnan(score.score)
    assert np.isnan(score.cross_entropy)


def test_one_document_has_no_standard_error() -> None:
    logits, batch = logits_and_batch()
    for objective in (Choice("acc"), LM()):
        outcomes = objective.outcomes(logits, batch)
        assert objective.summarise(outcomes[:1]).stderr == 0.0
        assert objective.summarise(outcomes[1:]).stderr > 0.0


def test_scores_are_ordered_and_survive_a_ledger() -> None:
    better, worse = Score(1.0, 1.2, 0.5, 1.0, 10, 0.1), Score(1.1, 1.1, 0.9, 1.0, 10, 0.1)
    tied = Score(1.0, 1.2, 0.6, 1.0, 10, 0.1)
    assert sorted([worse, better, tied], key=find_criterion("cross-entropy").key) == [tied, better, worse]
    assert "tasks" not in better.to_dict()
    assert Score(**better.to_dict()) == better
    mixed = Score(1.05, 1.15, 0.7, 1.0, 20, 0.1, {"a": better, "b": worse})
    assert mixed.tasks["a"] is better
    again = Score(**json.loads(json.dumps(mixed.to_dict())))
    assert again == mixed
    assert find_criterion("cross-entropy").key(again.tasks["b"]) == (1.1, -0.9)


def test_metric_follows_the_task() -> None:
    assert make_objective("choice", None, ["acc", "acc_norm"]).metric == "acc_norm"
    assert make_objective("choice", None, ["acc"]).metric == "acc"
    assert make_objective("choice", "acc", ["acc", "acc_norm"]).metric == "acc"
    with pytest.raises(AFTError, match="no objective 'magic'"):
        make_objective("magic", None, [])
    with pytest.raises(AFTError, match="knows no metric"):
        make_objective("choice", "f1", [])
    assert isinstance(make_objective("lm", None, []), LM)
    assert not isinstance(make_objective("lm", None, []), RFT)
    assert isinstance(make_objective("rft", "exact_match", []), RFT)


def test_settings_reach_the_loss() -> None:
    margin = make_objective("choice", None, ["acc"], choice_loss="margin", margin=2.5)
    assert margin.loss == ChoiceLoss("margin", margin=2.5)
    smooth = make_objective("choice", None, ["acc"], label_smoothing=0.1)
    assert smooth.loss == ChoiceLoss(label_smoothing=0.1)
    assert LM().loss is None


def naive_loss(scores: np.ndarray, gold: tuple[int, ...], loss: ChoiceLoss) -> float:
    right, wrong = scores[list(gold)], np.delete(scores, list(gold))
    if loss.name == "margin":
        return max(0.0, loss.margin - (right.max() - wrong.max()))
    p = np.exp(scores) / np.exp(scores).sum()
    e = loss.label_smoothing
    return float((1 - e) * -np.log(p[list(gold)].sum()) + e * np.mean(-np.log(p)))


LOSSES = [
    ChoiceLoss(),
    ChoiceLoss(label_smoothing=0.2),
    ChoiceLoss("margin"),
    ChoiceLoss("margin", margin=9.0),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("metric", ["acc", "acc_norm", "both"])
def test_losses_against_a_naive_formula_and_finite_differences(metric: str, loss: ChoiceLoss) -> None:
    objective = Choice(metric, loss)
    logits, batch = logits_and_batch()
    logits = (logits / 4).requires_grad_(True)

    def by_formula(logits: torch.Tensor) -> list[float]:
        rows = iter(logits.detach().log_softmax(-1).numpy())
        found = []
        for document in DOCS:
            sums = np.array([sum(next(rows)[token] for token in tail) for _, tail in document.pairs])
            per_character = sums / np.array(document.lengths) * np.mean(document.lengths)
            tables = {"acc": [sums], "acc_norm": [per_character], "both": [sums, per_character]}[metric]
            found.append(np.mean([naive_loss(scores, document.gold, loss) for scores in tables]))
        return found

    losses = objective.losses(logits, batch)
    assert losses.tolist() == pytest.approx(by_formula(logits))
    assert max(losses.tolist()) > 0
    losses.sum().backward()
    step = 1e-5
    for place in [(0, 3), (1, 4), (2, 5), (4, 7), (6, 3), (9, 5)]:
        nudge = torch.zeros_like(logits)
        nudge[place] = step
        slope = (sum(by_formula(logits + nudge)) - sum(by_formula(logits - nudge))) / (2 * step)
        assert logits.grad is not None
        assert float(logits.grad[place]) == pytest.approx(slope, abs=1e-6), place


def test_margin_where_every_option_is_right_or_wide_rows_are_padded() -> None:
    scores = torch.tensor([[1.0, 2.0, -torch.inf], [3.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    gold = torch.tensor([[True, True, False], [True, False, False]])
    losses = ChoiceLoss("margin", margin=3.0)(scores, gold)
    assert losses.tolist() == [0.0, 1.0]
    losses.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0, 0, 0], [-1, 0, 1]]


def test_both_metrics_are_scored_by_themselves_and_averaged() -> None:
    logits, batch = logits_and_batch()
    single = [Choice(metric) for metric in ("acc", "acc_norm")]
    scores = [objective.summarise(objective.outcomes(logits, batch)) for objective in single]
    both = Choice("both").summarise(Choice("both").outcomes(logits, batch))
    for name in ("score", "cross_entropy", "accuracy"):
        assert getattr(both, name) == pytest.approx(np.mean([getattr(score, name) for score in scores]))
    assert both.temperature == pytest.approx((scores[0].temperature * scores[1].temperature) ** 0.5)
    per_document = []
    for metric, score in zip(("acc", "acc_norm"), scores, strict=True):
        beta = 1 / score.temperature
        per_document.append([mean_loss([document], beta) for document in by_hand(metric)])
    assert both.stderr == pytest.approx(np.mean(per_document, axis=0).std(ddof=1) / 3**0.5, rel=1e-4)


def test_the_selection_score_does_not_depend_on_the_loss() -> None:
    logits, batch = logits_and_batch()
    found = [Choice("acc", loss).summarise(Choice("acc", loss).outcomes(logits, batch)) for loss in LOSSES]
    assert found == found[:1] * len(LOSSES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choice_loss": "margin", "label_smoothing": 0.1}, "Label smoothing is for cross-entropy"),
        ({"margin": 2.0}, "margin=2 means nothing to cross-entropy"),
        ({"choice_loss": "margin", "margin": 0.0}, "margin=0 is invalid"),
        ({"choice_loss": "margin", "margin": float("nan")}, "margin=nan is invalid"),
        ({"label_smoothing": 1.0}, "label_smoothing=1 is invalid"),
        ({"choice_loss": "hinge"}, "no choice loss 'hinge'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AFTError, match=message):
        make_objective("choice", None, ["acc"], **settings)
    with pytest.raises(AFTError, match=r"--\S+ means nothing to the objective 'lm'"):
        make_objective("lm", None, [], **settings)


def test_a_metric_means_nothing_to_lm() -> None:
    with pytest.raises(AFTError, match="--metric means nothing to the objective 'lm'"):
        make_objective("lm", "both", [])


def test_every_option_that_does_not_fit_is_named_and_what_to_do_said() -> None:
    with pytest.raises(AFTError) as found:
        make_objective("rft", None, [], choice_loss="margin", margin=2.0, label_smoothing=0.1)
    text = str(found.value)
    assert "--choice-loss, --margin, --label-smoothing means nothing to the objective 'rft'" in text
    assert "Leave it out, or train on a multiple-choice task." in text
    with pytest.raises(AFTError, match="Choose one of: choice, lm, rft"):
        make_objective("magic", None, [])
    with pytest.raises(AFTError, match="Use one of: acc, acc_norm, acc_bytes, both"):
        Choice("f1")


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "both"])
def test_double_precision_stays_double(metric: str) -> None:
    logits, batch = logits_and_batch()
    loss = Choice(metric).losses(logits, batch)
    assert loss.dtype == torch.float64
    parts = [metric] if metric != "both" else ["acc", "acc_norm"]
    expected = [
        [-np.log(np.exp(row)[list(gold)].sum() / np.exp(row).sum()) for row, gold in by_hand(m)]
        for m in parts
    ]
    assert loss.numpy() == pytest.approx(np.mean(expected, axis=0), abs=1e-12)


@pytest.mark.parametrize("objective", [Choice("acc"), Choice("acc_norm"), Choice("both"), LM()])
def test_losses_follow_the_logits_to_their_device(objective: Any) -> None:
    # The batch stays behind, as where a model's head lies on another GPU than its embedding. Tensors
    # without data, on the device "meta", refuse to meet the CPU's.
    logits, batch = logits_and_batch()
    far = logits.to("meta").requires_grad_()
    losses = objective.losses(far, batch)
    assert losses.device.type == "meta"
    assert losses.shape == (len(DOCS),)
    losses.sum().backward()
    assert far.grad is not None
    assert far.grad.device.type == "meta"
