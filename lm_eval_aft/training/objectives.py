"""What training minimises, and the score by which layer and epoch are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import Tensor

from lm_eval_aft.errors import AFTError
from lm_eval_aft.packing import Batch, option_logprobs, token_logprobs

CHOICE_METRICS = ("acc", "acc_norm")
# Logarithms of the inverse temperatures tried first: 1/e^7 to e^7.
_LOG_BETA_STEP = 0.35
_LOG_BETAS = tuple(_LOG_BETA_STEP * i for i in range(-20, 21))
# Inverse temperatures at which token losses are kept; the minimum is interpolated between them.
_GRID = np.exp(np.linspace(np.log(0.25), np.log(4.0), 13))


@dataclass(frozen=True)
class Score:
    """How a candidate (or the baseline) does on the selection split.

    Attributes:
        score: mean cross-entropy in nats after fitting one temperature; lower is better. This is
            what choices are made on: a vector cannot win it by rescaling confidence.
        cross_entropy: the same at temperature 1.
        accuracy: share of documents answered right (``choice``) or of gold tokens that are the
            model's first guess (``lm``), between 0 and 1. Breaks ties only.
        temperature: the temperature fitted.
        n: number of documents.
        stderr: standard error of ``score`` over documents, in nats.
    """

    score: float
    cross_entropy: float
    accuracy: float
    temperature: float
    n: int
    stderr: float = 0.0

    def order(self) -> tuple[float, float]:
        """Sorts better scores first."""
        return (self.score, -self.accuracy)

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for ledgers and headers."""
        return asdict(self)


class Objective(Protocol):
    """A loss per document, and the summary of many documents' outcomes."""

    name: str
    metric: str

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss in nats of every document, shape (documents,); differentiable."""

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """What `summarise` needs to know of every document."""

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        """Mean scores over documents, the temperature fitted on all of them."""


class Choice:
    """Cross-entropy over a document's options, scored as the harness's metric scores them.

    For ``acc`` an option's score is its summed log-likelihood; for ``acc_norm`` that divided by
    its length in characters, times the document's mean option length: the same order as the
    harness's, on the scale of a sum. With several right options, the probability of any counts.
    """

    name = "choice"

    def __init__(self, metric: str = "acc_norm") -> None:
        if metric not in CHOICE_METRICS:
            raise AFTError(f"The choice objective knows no metric {metric!r}.", "Use acc or acc_norm.")
        self.metric = metric

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        scores, gold = self._scores(logits, batch)
        return scores.logsumexp(1) - scores.masked_fill(~gold, -torch.inf).logsumexp(1)

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        scores, gold = self._scores(logits, batch)
        rows = scores.detach().double().cpu().numpy()
        marks = gold.cpu().numpy()
        sizes = [len(document.pairs) for document in batch.documents]
        return [np.stack([row[:n], mark[:n]]) for row, mark, n in zip(rows, marks, sizes, strict=True)]

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        width = max(outcome.shape[1] for outcome in outcomes)
        scores = np.full((len(outcomes), width), -np.inf)
        gold = np.zeros_like(scores, dtype=bool)
        for i, outcome in enumerate(outcomes):
            scores[i, : outcome.shape[1]] = outcome[0]
            gold[i, : outcome.shape[1]] = outcome[1] > 0
        right = np.where(gold, scores, -np.inf)

        def losses(log_beta: float) -> NDArray[np.float64]:
            beta = np.exp(log_beta)
            found: NDArray[np.float64] = logsumexp(beta * scores, axis=1) - logsumexp(beta * right, axis=1)
            return found

        def mean_loss(log_beta: float) -> float:
            return float(np.mean(losses(log_beta)))

        # With several right options there may be more than one dip: find the lowest on a grid first.
        rough = min(_LOG_BETAS, key=mean_loss)
        near = (rough - _LOG_BETA_STEP, rough + _LOG_BETA_STEP)
        fitted = minimize_scalar(mean_loss, bounds=near, method="bounded", options={"xatol": 1e-6})
        hits = gold[np.arange(len(outcomes)), scores.argmax(axis=1)]
        return Score(
            float(fitted.fun),
            mean_loss(0.0),
            float(hits.mean()),
            float(np.exp(-fitted.x)),
            len(outcomes),
            _stderr(losses(float(fitted.x))),
        )

    def _scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores (documents, most options), padded with -inf, and a mask of the right ones."""
        sums = option_logprobs(logits, batch)
        if self.metric == "acc_norm":
            flat = [length for document in batch.documents for length in document.lengths]
            lengths = torch.tensor(flat, dtype=sums.dtype, device=sums.device)
            means = torch.tensor(
                [float(np.mean(document.lengths)) for document in batch.documents],
                dtype=sums.dtype,
                device=sums.device,
            )
            sums = sums / lengths * means[batch.document.to(sums.device)]
        columns = [i for document in batch.documents for i in range(len(document.pairs))]
        width = max(columns) + 1
        place = (batch.document.to(sums.device), torch.tensor(columns, device=sums.device))
        scores = torch.full((len(batch.documents), width), -torch.inf, dtype=sums.dtype, device=sums.device)
        gold = torch.zeros(scores.shape, dtype=torch.bool)
        for i, document in enumerate(batch.documents):
            gold[i, list(document.gold)] = True
        return scores.index_put(place, sums), gold.to(sums.device)


class LM:
    """Token cross-entropy of the gold continuation, averaged over its tokens."""

    name = "lm"
    metric = "token_accuracy"

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return _per_document(-token_logprobs(logits, batch), batch)

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        wide = logits.detach()
        rows = [_per_document(-token_logprobs(wide * float(beta), batch), batch) for beta in _GRID]
        guesses = wide.argmax(-1)[batch.source.to(wide.device)]
        exact = (guesses == batch.targets.to(wide.device)).to(rows[0].dtype)
        rows += [_per_document(exact, batch), self.losses(wide, batch)]
        return list(torch.stack(rows, dim=1).double().cpu().numpy())

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        table = np.stack(outcomes)
        means = table.mean(axis=0)
        losses, accuracy, raw = means[: len(_GRID)], float(means[-2]), float(means[-1])
        best = int(losses.argmin())
        log_beta, lowest = float(np.log(_GRID[best])), float(losses[best])
        if 0 < best < len(_GRID) - 1:
            # The parabola through the minimum and its neighbours in log(beta).
            left, mid, right = losses[best - 1 : best + 2]
            bend = left - 2 * mid + right
            if bend > 0:
                shift = 0.5 * (left - right) / bend
                log_beta += shift * float(np.log(_GRID[1] / _GRID[0]))
                lowest = float(mid - 0.25 * (left - right) * shift)
        stderr = _stderr(table[:, best])
        return Score(lowest, raw, accuracy, float(np.exp(-log_beta)), len(outcomes), stderr)


class RFT(LM):
    """The same on solutions the model wrote itself and the task marked right: see `Rounds`."""

    name = "rft"


def make_objective(name: str, metric: str | None, task_metrics: Sequence[str]) -> Objective:
    """The objective called ``name``; its metric defaults to acc_norm where the task reports it.

    Raises:
        AFTError: unknown objective or metric.
    """
    if name in ("lm", "rft"):
        return LM() if name == "lm" else RFT()
    if name == "choice":
        return Choice(metric or ("acc_norm" if "acc_norm" in task_metrics else "acc"))
    raise AFTError(f"There is no objective {name!r}.", "Use choice, lm or rft.")


def _stderr(losses: NDArray[np.float64]) -> float:
    """Standard error of a mean over documents; 0 for fewer than two."""
    return float(losses.std(ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else 0.0


def _per_document(values: Tensor, batch: Batch) -> Tensor:
    """Mean over each document's scored tokens, shape (documents,)."""
    owner = batch.document.to(values.device)[batch.option.to(values.device)]
    count = torch.bincount(owner, minlength=len(batch.documents)).to(values.dtype)
    return torch.zeros_like(count).index_add(0, owner, values) / count
