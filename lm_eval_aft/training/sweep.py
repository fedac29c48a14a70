"""Training a protocol's candidates, choosing among them on the selection split, and calibrating the best."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from torch import Tensor

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.harness.splits import interleaved
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.training.candidate import Candidate, Engine, Recipe, Tick, Workers, in_steps
from lm_eval_aft.training.checkpoint import RunRecorder
from lm_eval_aft.training.recipe import Protocol, schedule
from lm_eval_aft.training.selection import Criterion, Score, find_criterion, mean_of_seeds, median_seed
from lm_eval_aft.training.setup import Prepared
from lm_eval_aft.training.trainer import require_norms

logger = logging.getLogger(__name__)
_DIVERGED = "Lower the learning rate, or train in a wider --dtype: bfloat16 or float32."
Setting = tuple[int, float | str, float | str]  # layer, learning rate, L2


@dataclass(frozen=True)
class LayerResult:
    """A layer's outcome on the selection split, in the last stage it reached.

    Attributes:
        stage: that stage.
        score: mean over seeds of the best epoch's score; ``accuracy`` likewise.
        baseline: the frozen model's score on the same documents.
        candidates: those of the layer's best setting, best score first.
    """

    layer: int
    stage: str
    score: float
    accuracy: float
    baseline: Score
    candidates: tuple[Candidate, ...]

    @property
    def change(self) -> float:
        """Difference from the baseline in nats; negative is better."""
        return self.score - self.baseline.score

    @property
    def criterion(self) -> Criterion:
        """What chose among its epochs and settings."""
        return self.candidates[0].criterion

    @property
    def improves(self) -> bool:
        """Whether it is better than the baseline."""
        return self.criterion.change(self, self.baseline) < 0


@dataclass(frozen=True)
class SweepResult:
    """Outcome of a sweep.

    Attributes:
        baseline: the frozen model on the whole selection split.
        layers: every layer in order.
        chosen: the layer that won.
        retries: how many retries it took.
        pruned: why the pair of model and task was given up, or ``""``.
        norms: median norm of the hidden states by layer.
        notes: further header entries about the search.
    """

    baseline: Score
    layers: tuple[LayerResult, ...]
    chosen: LayerResult
    retries: int = 0
    pruned: str = ""
    norms: Mapping[int, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def finalist(self) -> Candidate:
        """The chosen setting's median seed."""
        return median_seed(self.chosen.candidates)


@dataclass
class Sweep:
    """One run of a protocol.

    Attributes:
        train: training documents by seed, in the order the seed draws them.
        start: makes a candidate's initial intervention from its layer, its seed and, for a retry, the seed
            of a small random vector.
        norms: median norm of the hidden states by layer; relative learning rates and penalties need it.
        saved: states of an interrupted run's candidates by name; the run resumes from them.
    """

    engine: Engine
    protocol: Protocol
    layers: Sequence[int]
    _: KW_ONLY
    seeds: Sequence[int]
    train: dict[int, list[TokenizedDocument]]
    selection: Sequence[TokenizedDocument]
    start: Callable[[int, int, int | None], Intervention]
    events: RunRecorder
    norms: Mapping[int, float] = field(default_factory=dict)
    workers: Workers = field(default_factory=Workers)
    saved: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = field(default_factory=dict)
    candidates: dict[str, Candidate] = field(default_factory=dict)
    _baselines: dict[int, Score] = field(default_factory=dict)
    _found: dict[int, LayerResult] = field(default_factory=dict)
    _uncounted: dict[str, range] = field(default_factory=dict)

    @property
    def criterion(self) -> Criterion:
        """What makes one candidate better than another."""
        return find_criterion(self.protocol.criterion)

    def run(self) -> SweepResult:
        """Search, compare penalties, train the finalists, retry where nothing helped.

        Raises:
            AFTError: no setting kept a finite score on every seed.
        """
        protocol = self.protocol
        if any(isinstance(rate, str) for rate in (*protocol.lr, *protocol.l2)):
            require_norms(self.norms, "Leave out that layer, or give numbers, as in --lr 1e-3 --l2 0.")
        settings: list[Setting] = [(layer, lr, protocol.l2[0]) for layer in self.layers for lr in protocol.lr]
        drawn = min(len(documents) for documents in self.train.values())
        plan = schedule(protocol, len(self.layers), drawn, len(self.selection))
        searched: list[Candidate] = []
        for stage in plan[:-1]:
            if stage.name == "search":
                searched = searched or [self._candidate("search", setting) for setting in settings]
                done = sum(s.epochs for s in plan[: plan.index(stage)])
                group = searched
            else:
                wider = [(layer, lr, l2) for layer, lr, _ in settings for l2 in protocol.l2]
                done, group = 0, [self._candidate("penalty", setting) for setting in wider]
            self._advance(group, done + stage.epochs, stage.train, stage.selection)
            groups = self._rank([[c] for c in group], stage.selection, slice(done, done + stage.epochs))
            searched = [group[0] for group in groups[: stage.keep]]
            settings = [candidate.setting for candidate in searched]
        if not protocol.rungs:
            settings = [(layer, lr, l2) for layer, lr, _ in settings for l2 in protocol.l2]
        finals = [[self._candidate("final", setting, seed) for seed in self.seeds] for setting in settings]
        self._advance([c for group in finals for c in group], protocol.epochs, None, None)
        ranking = self._rank(finals, len(self.selection), slice(None))
        return self._retried(ranking[0])

    def baseline(self, selection: int | None = None) -> Score:
        """The frozen model on the first ``selection`` documents of the selection split, or all."""
        n = len(self.selection) if selection is None else selection
        if n not in self._baselines:
            score = self.engine.baseline(self.selection[:n], self._tick)
            self._baselines[n] = self.workers.broadcast(score)
        return self._baselines[n]

    def _retried(self, best: list[Candidate]) -> SweepResult:
        """Choose the best group, or start its layer and the next-best ones again until one helps."""
        baseline, limit = self.baseline(), self.protocol.retries
        change = self.criterion.change
        chosen, retries = self._result(best, len(self.selection), slice(None)), 0
        order = sorted(
            self._found.values(), key=lambda each: (each.layer != chosen.layer, change(each, each.baseline))
        )
        while not chosen.improves and retries < limit:
            retries += 1
            again = order[min(retries - 1, len(order) - 1)]
            _, lr, l2 = again.candidates[0].setting
            logger.info(
                "No better than the baseline: retry %d of %d, at layer %d, from a small random vector.",
                *(retries, limit, again.layer),
            )
            group = [
                self._candidate(f"retry-{retries}", (again.layer, lr, l2), seed, noise=retries)
                for seed in self.seeds
            ]
            self._advance(group, self.protocol.epochs, None, None)
            if all(candidate.scores for candidate in group):
                retried = self._result(group, len(self.selection), slice(None))
                chosen = retried if change(retried, chosen) < 0 else chosen
        pruned = ""
        if limit and not chosen.improves:
            pruned = f"no better than the baseline on the selection split after {retries} retries"
        self._found[chosen.layer] = chosen
        layers = tuple(self._found[layer] for layer in sorted(self._found))
        return SweepResult(baseline, layers, chosen, retries, pruned, self.norms)

    def _candidate(
        self, stage: str, setting: Setting, seed: int | None = None, noise: int | None = None
    ) -> Candidate:
        layer, lr, l2 = setting
        protocol = self.protocol
        last = stage not in ("search", "penalty")
        recipe = Recipe(
            lr=lr,
            l2=l2,
            epochs=protocol.epochs if last else 1000,
            patience=protocol.patience if last else None,
            clip=protocol.clip,
            min_epochs=protocol.min_epochs,
            regression=protocol.regression and last,
            criterion=protocol.criterion,
        )
        seed = self.seeds[0] if seed is None else seed
        start = self.start(layer, seed, None if noise is None else 1000 * noise + seed)
        made = Candidate(layer, seed, recipe, start, stage, self.norms)
        if made.name in self.saved:
            made.restore(*self.saved[made.name])
            self._uncounted[made.name] = range(made.epoch)
        self.candidates[made.name] = made
        return made

    def _advance(
        self, group: Sequence[Candidate], epochs: int, train: int | None, selection: int | None
    ) -> None:
        """Train candidates until each has stopped or done this many epochs in all.

        They advance together, so that all layers of a seed share one frozen pass per batch, and all
        candidates one per selection batch.
        """
        baseline = self.baseline(selection)
        self._count_earlier(self.workers.shard(group), epochs, train, selection)
        while live := [c for c in group if (not c.stopped or c.steps) and c.epoch < epochs]:
            epoch = min(candidate.epoch for candidate in live)
            live = [candidate for candidate in live if candidate.epoch == epoch]
            mine = self.workers.shard(live)
            for seed, done in sorted({(c.seed, c.steps) for c in mine if c.trained}):
                ours = [c for c in mine if (c.seed, c.steps) == (seed, done)]
                documents = self.train[seed][:train]
                random.Random(f"{seed}|{epoch}").shuffle(documents)
                steps = list(in_steps(interleaved(documents), self.protocol.batch_size))
                self._train(ours, steps[done:])
            finite = [candidate for candidate in mine if not candidate.stopped]
            if finite:
                scores = self.engine.evaluate(finite, self.selection[:selection], self._tick)
                for candidate, score in zip(finite, scores, strict=True):
                    candidate.record(score, baseline)
            self.workers.exchange(live)
            for candidate in live:
                candidate.steps = 0
                self.events.epoch(candidate, baseline)
            self.events.save(self.candidates.values())

    def _count_earlier(
        self, group: Sequence[Candidate], epochs: int, train: int | None, selection: int | None
    ) -> None:
        """Count the epochs that an interrupted run has done already."""
        done = 0
        for candidate in group:
            left = self._uncounted.get(candidate.name, range(0))
            counted = range(left.start, max(left.start, min(left.stop, epochs)))
            self._uncounted[candidate.name] = range(counted.stop, left.stop)
            documents = len(self.train[candidate.seed][:train]) + len(self.selection[:selection])
            done += len(counted) * documents
        if done:
            self.events.tick(done)

    def _train(self, candidates: Sequence[Candidate], steps: Sequence[Sequence[TokenizedDocument]]) -> None:
        """One step at a time: between two steps the run can be saved, and ended."""
        for step in steps:
            self.engine.train(candidates, [step], self.events.tick)
            for candidate in candidates:
                candidate.steps += 1
            self.events.pause(self.candidates.values())

    def _tick(self, done: int, /) -> None:
        # Scoring changes no candidate, so the run can be saved anywhere in it.
        self.events.tick(done)
        self.events.pause(self.candidates.values())

    def _rank(
        self, groups: Sequence[list[Candidate]], selection: int, epochs: slice
    ) -> list[list[Candidate]]:
        """Groups (one setting over its seeds) by mean best score in ``epochs``, best first.

        A group in which a seed diverged is out: its mean would flatter it.
        """
        whole = [group for group in groups if all(candidate.scores[epochs] for candidate in group)]
        if not whole:
            raise AFTError("Every layer diverged: no candidate kept a finite score.", _DIVERGED)
        results = [self._result(group, selection, epochs) for group in whole]
        order = sorted(range(len(whole)), key=lambda i: self.criterion.key(results[i]))
        for i in reversed(order):  # the best of each layer comes last
            self._found[whole[i][0].layer] = results[i]
        return [whole[i] for i in order]

    def _result(self, group: list[Candidate], selection: int, epochs: slice) -> LayerResult:
        best = {c.name: self.criterion.best(c.scores[epochs]) for c in group}
        return LayerResult(
            group[0].layer,
            group[0].stage,
            *mean_of_seeds(list(best.values())),
            self.baseline(selection),
            tuple(sorted(group, key=lambda c: self.criterion.key(best[c.name]))),
        )


# After the search: the finalists' coefficients, and the scores that their headers state.


def coefficients(
    prepared: Prepared, engine: Engine, found: SweepResult, selection: Sequence[TokenizedDocument], tick: Tick
) -> dict[int, Calibration]:
    """The finalists' coefficients by seed, where the plan leaves them open.

    All take the chosen one's, as far as their own norms allow.
    """
    plan, finalist = prepared.plan, found.finalist
    if not (plan.calibrate or plan.norm_cap) or finalist.best is None:
        return {}
    caps: dict[int, float | None] = {c.seed: None for c in found.chosen.candidates}
    if plan.norm_cap is not None:
        layers = finalist.intervention.layers
        for each in found.chosen.candidates:
            if each.best is not None:
                own = {at: each.best[f"layers.{at}"] for at in layers}
                caps[each.seed] = norm_cap(plan.norm_cap, found.norms, own)
    chosen = Calibration({}, 1.0, None)
    if plan.calibrate:
        cap = caps[finalist.seed]
        chosen = calibrate(engine, finalist, found.baseline, selection, cap, tick)
    return {seed: chosen.capped(cap) for seed, cap in caps.items()}


def score_again(
    finalists: dict[int, SteeringVector],
    found: SweepResult,
    engine: Engine,
    selection: Sequence[TokenizedDocument],
    workers: Workers,
) -> None:
    """Put the selection scores of the vectors as they are saved into their headers.

    What the search gave the trained directions at coefficient 1 stays beside them, as ``trained``.
    """
    group = []
    for seed, vector in finalists.items():
        own = {name: tensor.clone() for name, tensor in vector.tensors.items()}
        used = Intervention(METHODS[vector.method], own, vector.coefficient, vector.positions)
        group.append(Candidate(found.finalist.layer, seed, Recipe(), used, "finished"))
    scores = engine.evaluate(group, selection, lambda _: None) if workers.is_main else []
    for vector, score in zip(finalists.values(), workers.broadcast(scores), strict=True):
        if not math.isfinite(score.score):
            logger.warning("The finished vector's own scores are not finite; its header has the search's.")
            continue
        said = vector.metadata["selection"]
        vector.metadata["selection"] = {**said, "vector": score.to_dict(), "trained": said["vector"]}


# Calibration: the coefficient at which a finished vector does best on the selection split.

COEFFICIENTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
REFINEMENTS = 2  # rounds in which the gaps beside the best coefficient are halved


@dataclass(frozen=True)
class Calibration:
    """The curve of selection scores over coefficients, and the coefficient chosen from it.

    Attributes:
        curve: score by coefficient, ascending, those that are finite; 0 is the baseline.
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
    documents: Sequence[TokenizedDocument],
    cap: float | None,
    tick: Tick,
) -> Calibration:
    """Search a finished candidate's coefficient on the selection documents.

    First `COEFFICIENTS`, then twice the midpoints beside the best. Equal scores go to the coefficient
    nearest 1.

    Args:
        cap: largest coefficient allowed.

    Raises:
        AFTError: the candidate has no finite score.
    """
    if candidate.best is None:
        raise AFTError(f"{candidate.name} has no finite score.", _DIVERGED)
    allowed = [c for c in COEFFICIENTS if cap is None or c <= cap] or [float(cap or 0.0)]
    curve, best = {0.0: baseline}, candidate.criterion.coefficient
    for round_ in range(1 + REFINEMENTS):
        wanted = allowed if round_ == 0 else _midpoints(curve, best(curve))
        wanted = [c for c in wanted if c not in curve]
        group = [_at(candidate, candidate.best, coefficient) for coefficient in wanted]
        if group:
            scores = zip(wanted, engine.evaluate(group, documents, tick), strict=True)
            curve |= {c: score for c, score in scores if math.isfinite(score.score)}
    if len(curve) == 1:
        raise AFTError(f"{candidate.name} has no finite score at any coefficient.", _DIVERGED)
    chosen = best({c: score for c, score in curve.items() if c > 0})
    return Calibration(dict(sorted(curve.items())), chosen, cap)


def norm_cap(share: float, residual: Mapping[int, float], vectors: dict[int, Tensor]) -> float:
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


def _midpoints(curve: dict[float, Score], best: float) -> list[float]:
    """The midpoints between the best coefficient and its neighbours."""
    known = sorted(curve)
    place = known.index(best)
    neighbours = known[max(0, place - 1) : place] + known[place + 1 : place + 2]
    return [round((best + other) / 2, 6) for other in neighbours]
