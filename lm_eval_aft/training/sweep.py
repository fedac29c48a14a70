"""Training every layer and seed, and choosing among them on the selection split."""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lm_eval_aft.errors import AFTError
from lm_eval_aft.packing import Document
from lm_eval_aft.training.fit import Candidate, Engine, Tick, in_steps
from lm_eval_aft.training.objectives import Score


@dataclass(frozen=True)
class LayerResult:
    """One layer over all its seeds, on the selection split.

    Attributes:
        score: mean over seeds of the best epoch's score; ``accuracy`` likewise.
        candidates: the layer's candidates, best score first.
    """

    layer: int
    score: float
    accuracy: float
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class SweepResult:
    """Outcome of a sweep: every layer in order, and the choice."""

    baseline: Score
    layers: tuple[LayerResult, ...]
    chosen: LayerResult

    @property
    def finalist(self) -> Candidate:
        """The chosen layer's median seed; of an even number, the worse of the middle two."""
        return self.chosen.candidates[len(self.chosen.candidates) // 2]


def parse_layers(text: str, depth: int) -> list[int]:
    """Layers named by ``all``, indices, ranges and depth percentages: ``3,5-8,25%-75%:2``.

    A range includes both ends; ``:N`` after it takes every Nth layer. Percentages are of the
    depth, 0 % being the first block and 100 % the last.

    Raises:
        AFTError: unreadable, or out of range.
    """
    if text.strip().lower() == "all":
        return list(range(depth))
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+%?)(?:\s*-\s*(\d+%?))?(?::(\d+))?\s*", part)
        if not match:
            raise AFTError(f"Cannot read layers {part.strip()!r}.", "Examples: all, 3, 2,5, 4-8, 25%-75%:2.")
        first = _layer(match[1], depth)
        last = _layer(match[2], depth) if match[2] else first
        step = int(match[3] or 1)
        if last < first or step < 1:
            raise AFTError(f"Layers {part.strip()!r} are empty.", "Write the smaller end first.")
        if last >= depth:
            raise AFTError(f"Layer {last} is out of range: this model has blocks 0 to {depth - 1}.")
        found.update(range(first, last + 1, step))
    return sorted(found)


def run_sweep(
    engine: Engine,
    candidates: Sequence[Candidate],
    train: dict[int, list[Document]],
    selection: Sequence[Document],
    baseline: Score,
    *,
    tick: Tick,
    after_epoch: Callable[[Candidate, Score], None],
    save: Callable[[], None],
) -> SweepResult:
    """Train all candidates epoch by epoch and choose a layer.

    Candidates go in step, so that one frozen pass per batch serves all layers of a seed, and one
    pass per selection batch serves everybody. The layer is the one with the best mean score over
    seeds; accuracy breaks ties.

    Args:
        train: training documents by seed, in the order the seed draws them.
        tick: progress, in candidate-documents.
        after_epoch: called with each candidate and its new score.
        save: called when every candidate has finished an epoch.

    Raises:
        AFTError: no layer kept a finite score on every seed.
    """
    while live := [candidate for candidate in candidates if not candidate.stopped]:
        epoch = min(candidate.epoch for candidate in live)
        for seed in sorted({candidate.seed for candidate in live}):
            ours = [candidate for candidate in live if candidate.seed == seed]
            documents = list(train[seed])
            random.Random(f"{seed}|{epoch}").shuffle(documents)
            engine.train(ours, list(in_steps(documents, ours[0].recipe.batch_size)), tick)
        finite = [candidate for candidate in live if not candidate.stopped]
        for candidate, score in zip(finite, engine.evaluate(finite, selection, tick), strict=True):
            candidate.record(score)
            after_epoch(candidate, score)
        save()
    return choose(candidates, baseline)


def choose(candidates: Sequence[Candidate], baseline: Score) -> SweepResult:
    """Rank layers by their mean selection score over seeds; see `run_sweep`."""
    results = []
    for layer in sorted({candidate.layer for candidate in candidates}):
        group = [candidate for candidate in candidates if candidate.layer == layer]
        scores = [candidate.best_score for candidate in group]
        known = [score for score in scores if score is not None]
        if len(known) < len(group):
            continue  # a seed diverged: its mean would flatter the layer
        ordered = sorted(group, key=lambda c: c.best_score.order() if c.best_score else (0.0, 0.0))
        results.append(
            LayerResult(
                layer,
                statistics.fmean(score.score for score in known),
                statistics.fmean(score.accuracy for score in known),
                tuple(ordered),
            )
        )
    if not results:
        raise AFTError("Every layer diverged: no candidate kept a finite score.", "Lower the learning rate.")
    chosen = min(results, key=lambda result: (result.score, -result.accuracy))
    return SweepResult(baseline, tuple(results), chosen)


def _layer(text: str, depth: int) -> int:
    if text.endswith("%"):
        percent = int(text[:-1])
        if percent > 100:
            raise AFTError(f"Depth {text} is beyond the last layer.", "Use 0% to 100%.")
        return round(percent / 100 * (depth - 1))
    return int(text)
