"""The coefficient: how strongly a finished vector is best applied, by the selection split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lm_eval_aft.errors import AFTError
from lm_eval_aft.packing import Document
from lm_eval_aft.training.fit import Candidate, Engine, Recipe
from lm_eval_aft.training.objectives import Score

COEFFICIENTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
REFINEMENTS = 2  # rounds in which the gaps beside the best coefficient are halved


@dataclass(frozen=True)
class Calibration:
    """The curve of selection scores over coefficients, and the coefficient chosen from it.

    Attributes:
        curve: score by coefficient, ascending; 0 is the baseline.
        coefficient: the best of them that the cap allows; at least as good as 1 where that is allowed.
        cap: the largest coefficient allowed, or ``None``.
    """

    curve: dict[float, Score]
    coefficient: float
    cap: float | None = None

    def capped(self, cap: float | None) -> Calibration:
        """The same under another cap."""
        allowed = self.coefficient if cap is None else min(self.coefficient, cap)
        return replace(self, coefficient=allowed, cap=cap)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for headers."""
        rows = [[c, score.score, score.accuracy, score.stderr] for c, score in self.curve.items()]
        return {"coefficient": self.coefficient, "cap": self.cap, "curve": rows}


def calibrate(
    engine: Engine,
    candidate: Candidate,
    baseline: Score,
    documents: Sequence[Document],
    cap: float | None,
    tick: Callable[[int], None],
) -> Calibration:
    """Search a finished candidate's coefficient on the selection documents.

    First `COEFFICIENTS`, then twice the midpoints beside the best. Equal scores go to the coefficient
    nearest 1.

    Args:
        cap: largest coefficient allowed.

    Raises:
        AFTError: the candidate never had a finite score.
    """
    if candidate.best is None:
        raise AFTError(f"{candidate.name} has no finite score.", "Lower the learning rate.")
    allowed = [c for c in COEFFICIENTS if cap is None or c <= cap] or [float(cap or 0.0)]
    curve = {0.0: baseline}
    for round_ in range(1 + REFINEMENTS):
        wanted = allowed if round_ == 0 else _beside(curve, _best(curve))
        wanted = [c for c in wanted if c not in curve]
        group = [_at(candidate, candidate.best, coefficient) for coefficient in wanted]
        if group:
            curve |= dict(zip(wanted, engine.evaluate(group, documents, tick), strict=True))
    chosen = _best({c: score for c, score in curve.items() if c > 0})
    return Calibration(dict(sorted(curve.items())), chosen, cap)


def norm_cap(share: float, residual: dict[int, float], vectors: dict[int, Tensor]) -> float:
    """The coefficient at which a vector's norm is ``share`` of the median residual norm at a layer.

    Args:
        residual: median norm of the hidden states by layer.
        vectors: the vector at each of these layers; the tightest of them counts.
    """
    return min(share * residual[layer] / max(1e-30, float(v.norm())) for layer, v in vectors.items())


def _at(candidate: Candidate, tensors: dict[str, Tensor], coefficient: float) -> Candidate:
    own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    intervention = replace(candidate.intervention, tensors=own, coefficient=coefficient)
    return Candidate(candidate.layer, candidate.seed, Recipe(), intervention, "calibration")


def _best(curve: dict[float, Score]) -> float:
    return min(curve, key=lambda c: (*curve[c].order(), abs(c - 1)))


def _beside(curve: dict[float, Score], best: float) -> list[float]:
    """The midpoints between the best coefficient and its neighbours."""
    known = sorted(curve)
    place = known.index(best)
    neighbours = known[max(0, place - 1) : place] + known[place + 1 : place + 2]
    return [round((best + other) / 2, 6) for other in neighbours]
