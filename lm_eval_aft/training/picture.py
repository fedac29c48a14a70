"""``sweep.png``: what every layer came to, and how the finalists got there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval_aft.training.fit import Candidate
from lm_eval_aft.training.objectives import Score
from lm_eval_aft.training.sweep import LayerResult, SweepResult
from lm_eval_aft.vector import replacing

_CHOSEN, _OTHER, _BASELINE = "#c2410c", "#1d4ed8", "#6b7280"
_WIDTH_95 = 1.96  # standard errors on either side of a mean in a normal 95 % interval


def draw_sweep(sweep: SweepResult, metric: str, path: Path) -> None:
    """Write a picture of a sweep: selection score and accuracy by layer, and the finalists' curves.

    Bars are 95 % intervals over selection documents (normal approximation), of the best epoch's
    median seed; they do not include the luck of having been chosen.

    Raises:
        AFTError: the place cannot be written.
    """
    # Not pyplot: it would look for a display, and keep every figure.
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
        # Layers that left early were judged on fewer documents: drawn as differences from the baseline there.
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
    best = _best(result.candidates[len(result.candidates) // 2])
    if quantity == "score":
        return best.stderr
    return float((best.accuracy * (1 - best.accuracy) / max(best.n, 1)) ** 0.5)


def _best(candidate: Candidate) -> Score:
    return min(candidate.scores, key=Score.order)
