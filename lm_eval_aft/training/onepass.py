"""The protocol ``onepass``: a backward pass gives every layer's direction, a search the layer and length."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.steering.intervention import POSITIONS, Intervention
from lm_eval_aft.steering.methods import METHODS, Method
from lm_eval_aft.training.candidate import Candidate, Engine, Recipe, Workers
from lm_eval_aft.training.checkpoint import RunRecorder, State
from lm_eval_aft.training.gradients import Gradients
from lm_eval_aft.training.recipe import KEPT_BYTES, LINE_SEARCH, Protocol, documents_of
from lm_eval_aft.training.selection import Criterion, Score, find_criterion, mean_of_seeds
from lm_eval_aft.training.setup import Prepared
from lm_eval_aft.training.sweep import LayerResult, SweepResult
from lm_eval_aft.training.trainer import Reference, Trajectory, by_length, master_dtype, require_norms


@dataclass
class Trial(Candidate):
    """A vector of the search: so far along a direction, or where a refinement has come to.

    Attributes:
        share: its length, as a share of the median residual norm.
    """

    share: float = 0.0
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.stage}/layer{self.layer}-{self.intervention.positions}-seed{self.seed}-{self.label}"

    @property
    def trained(self) -> bool:
        return False

    @property
    def chosen(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "positions": self.intervention.positions,
            "norm": self.norm(best=True),
            "share": float(f"{self.share:.3g}"),  # of the median residual norm
            "refined": self.best_epoch - 1,
        }


class _Probe(Candidate):
    """Keeps the gradient of a training step instead of taking it."""

    def step(self) -> None:
        pass


@dataclass(frozen=True)
class Direction:
    """Where the loss falls fastest at v = 0, when vectors are measured in residual norms.

    Attributes:
        layer: the layer steered, or the lowest of them.
        tensors: the vector whose length is one median residual norm; with several layers, whose lengths have
            that root of summed squares.
        scales: median residual norm by tensor.
        guess: the share of it at which a quadratic model of the loss is lowest, whose curvature is the mean
            square of the documents' slopes (the empirical Fisher information).
        gain: nats that this model expects of it, the slope being the one that halves of the documents, which
            share none, agree on; negative where they do not.
        agreement: cosine of the halves' gradients.
    """

    layer: int
    positions: str
    tensors: dict[str, Tensor]
    scales: dict[str, float]
    guess: float
    gain: float
    agreement: float

    def at(self, share: float) -> dict[str, Tensor]:
        """The vector of this length."""
        return {name: tensor * share for name, tensor in self.tensors.items()}

    def share(self, tensors: dict[str, Tensor]) -> float:
        """The length of a vector at these layers, as a share of the residual norm."""
        return math.hypot(*(float(tensors[name].norm()) / scale for name, scale in self.scales.items()))


def directions(
    found: Gradients,
    norms: Mapping[int, float],
    sites: Sequence[Sequence[int]],
    draw: Callable[[int], Tensor] | None = None,
) -> list[Direction]:
    """The direction at each site, a layer or several together, for each choice of positions.

    Args:
        norms: median residual norm by layer.
        draw: makes a random direction for a layer (control ``random``); the length tried first is still the
            gradient's.
    """
    made = []
    place = {layer: i for i, layer in enumerate(found.layers)}
    for positions, sums in found.sums.items():
        mean, (one, other) = found.mean(positions), found.halves(positions)
        for site in sites:
            own = [place[layer] for layer in site]
            scales = torch.tensor([norms[layer] for layer in site]).to(mean)
            steepest = -(scales**2).unsqueeze(1) * mean[own]
            steepest /= ((scales.unsqueeze(1) * mean[own]).norm()).clamp(min=1e-30)
            slopes = (sums[:, own] * steepest).sum((1, 2))
            curvature = float((slopes**2 / found.counts.clamp(min=1)).sum() / found.counts.sum())
            guess = -float(slopes.sum() / found.counts.sum()) / max(curvature, 1e-30)
            agreement = float(((scales**2).unsqueeze(1) * one[own] * other[own]).sum())
            agreed = agreement / max(float((scales.unsqueeze(1) * mean[own]).norm()), 1e-30)
            taken = steepest
            if draw is not None:
                drawn = torch.stack([draw(layer) for layer in site]).to(mean)
                taken = drawn / drawn.norm(dim=1, keepdim=True) * steepest.norm(dim=1, keepdim=True)
            made.append(
                Direction(
                    min(site),
                    positions,
                    {f"layers.{layer}": taken[i] for i, layer in enumerate(site)},
                    {f"layers.{layer}": norms[layer] for layer in site},
                    guess,
                    math.copysign(agreed**2, agreed) / (2 * max(curvature, 1e-30)),
                    float(torch.cosine_similarity(one[own].flatten(), other[own].flatten(), dim=0)),
                )
            )
    return made


@dataclass
class OnePass:
    """One run of a protocol without an optimiser.

    Attributes:
        sites: the layers that candidates steer: one each, or all together.
        positions: the choices of positions to search.
        train: training documents by seed.
        norms: median residual norm by layer; one that is 0 or infinite is an error.
        random: draw the directions at random (the control).
        saved: states of an interrupted run by name; the run resumes from them.
    """

    engine: Trajectory | Reference
    protocol: Protocol
    sites: Sequence[Sequence[int]]
    _: KW_ONLY
    method: Method
    positions: Sequence[str]
    seeds: Sequence[int]
    train: dict[int, list[TokenizedDocument]]
    norms: Mapping[int, float]
    selection: Sequence[TokenizedDocument]
    events: RunRecorder
    random: bool = False
    workers: Workers = field(default_factory=Workers)
    saved: dict[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.progress = SearchState()
        if self.progress.name in self.saved:
            self.progress.restore(*self.saved[self.progress.name])
        self._states: list[Any] = [self.progress]
        self._found: dict[int, LayerResult] = {}
        self._passes: dict[int, Gradients] = {}
        self._directions: dict[int, list[Direction]] = {}
        # Each round scores the documents that are new in it, in the same batches for every trial.
        rounds = {documents_of(len(self.selection), rung.selection) for rung in self.protocol.search_rounds}
        self._parts = list(itertools.pairwise(sorted({0, *rounds, len(self.selection)})))
        self._outcomes: dict[tuple[str, int], list[NDArray[np.float64]]] = {}
        self._keep_frozen(self.selection)

    def _keep_frozen(self, documents: Sequence[TokenizedDocument]) -> None:
        """Let the next frozen pass over these documents serve all trials, if the blocks' outputs fit."""
        engine = self.engine
        if isinstance(engine, Trajectory):
            layers = {min(site) for site in self.sites}
            tokens = sum(each.tokens(engine.packed) * each.rows(engine.packed) for each in documents)
            size = next(engine.model.parameters()).element_size() * engine.backbone.hidden_size
            engine.keep_bytes = KEPT_BYTES
            engine.keep_layers = layers if tokens * size * len(layers) <= KEPT_BYTES else ()

    @property
    def criterion(self) -> Criterion:
        """What makes one trial better than another."""
        return find_criterion(self.protocol.criterion)

    def baseline(self, selection: int | None = None) -> Score:
        """The frozen model on the first ``selection`` documents of the selection split, or all."""
        return self._score([], len(self.selection) if selection is None else selection)[0]

    def run(self) -> SweepResult:
        """One backward pass; a search over layers, positions and lengths; a line search; a refinement.

        Raises:
            AFTError: no trial had a finite score.
        """
        require_norms(self.norms, "Leave out that layer with --layers.")
        first = self.seeds[0]
        self.baseline()
        self._keep_frozen([*self.selection, *self.train[first]])  # the latter for the refinement
        every = self._directions_of(first)
        live = sorted(range(len(every)), key=lambda i: -every[i].gain)
        live = live[: len(self.sites)]  # of several positions, those that promise most
        best: dict[int, int] = {}
        for rung in self.protocol.search_rounds:
            n = documents_of(len(self.selection), rung.selection)
            scored = self._search_lengths(live, best, n)
            keep = max(self.protocol.finalists, math.ceil(len(live) * rung.keep))
            live = sorted(scored, key=lambda i: self.criterion.key(scored[i].scores[-1]))[:keep]
        if isinstance(self.engine, Trajectory):  # what follows is at few layers
            self.engine.keep_only({every[i].layer for i in live[: self.protocol.finalists]})
        finals = []
        for i in live[: self.protocol.finalists]:
            group = [self._line_search(i, seed, best[i], n) for seed in self.seeds]
            finals.append([self._refine(trial, i, n) for trial in group])
        ranked = sorted(
            (self._result(group, len(self.selection)) for group in finals), key=self.criterion.key
        )
        for result in reversed(ranked):
            self._found[result.layer] = result
        pruned = "" if ranked[0].improves else "no trial does better than the baseline on the selection split"
        layers = tuple(self._found[layer] for layer in sorted(self._found))
        notes = self._notes(ranked[0])
        return SweepResult(self.baseline(), layers, ranked[0], 0, pruned, dict(self.norms), notes)

    def _notes(self, chosen: LayerResult) -> dict[str, Any]:
        """How much was tried, and how well halves of the training documents and seeds agree."""
        vectors = [
            torch.cat([trial.best[name].flatten() for name in sorted(trial.best)])
            for trial in sorted(chosen.candidates, key=lambda trial: trial.seed)
            if trial.best
        ]
        pairs = itertools.combinations(vectors, 2)
        first = self.seeds[0]
        own, parts = self._directions_of(first), len(self._passes[first].counts)
        # Documents that all share one row have no halves.
        halves = {f"{d.layer} {d.positions}": round(d.agreement, 4) for d in own if parts > 1}
        return {
            "trials": len({name for name, _ in self.progress.scores if not name.startswith("baseline")}),
            "halves_cosine": halves,
            "seeds_cosine": [round(float(torch.cosine_similarity(a, b, dim=0)), 4) for a, b in pairs],
        }

    def _directions_of(self, seed: int) -> list[Direction]:
        """A seed's directions, in the same order for every seed: by positions, then by layer."""
        if seed not in self._directions:
            layers = [layer for site in self.sites for layer in site]
            objective = at_temperature(self.engine.objective, self.baseline().temperature)
            with _objective(self.engine, objective):
                found = Gradients(
                    self.engine, self.train[seed], layers, self.positions, f"pass-seed{seed}", self.workers
                )
                if found.name in self.saved:
                    found.restore(*self.saved[found.name])
                self._states.append(found)
                found.run(self.events.tick, lambda: self.events.pause(self._states))
            draw = partial(_random_vector, seed, self.engine.backbone.hidden_size) if self.random else None
            self._passes[seed] = found
            self._directions[seed] = directions(found, self.norms, self.sites, draw)
            self.events.save(self._states)
        return self._directions[seed]

    def _score(self, trials: Sequence[Trial], n: int) -> tuple[Score, list[Score | None]]:
        """Scores of the baseline and of trials on the first ``n`` selection documents; None: not finite."""
        scores = self.progress.scores
        depth = len(self.engine.backbone.blocks)
        zero = {f"layers.{depth - 1}": torch.zeros(self.engine.backbone.hidden_size)}
        baseline = Trial(depth - 1, 0, Recipe(), Intervention(METHODS["static"], zero, 0.0), "baseline")
        wanted = [each for each in (baseline, *trials) if (each.name, n) not in scores]
        mine = [str(each.name) for each in self.workers.shard(wanted)]
        parts = [part for part in self._parts if part[1] <= n]
        for start, stop in parts:
            new = [each for each in wanted if each.name in mine and (each.name, stop) not in self._outcomes]
            found = self.engine.outcomes(new, self.selection[start:stop], self._tick) if new else []
            self._outcomes |= {(each.name, stop): own for each, own in zip(new, found, strict=True)}
        summarise = self.engine.objective.summarise
        given = {
            name: summarise([o for _, stop in parts for o in self._outcomes[name, stop]]) for name in mine
        }
        known = {name: score for part in self.workers.gather(given) for name, score in part.items()}
        for each in wanted:
            scores[each.name, n] = known[each.name]
        for each in wanted:
            if each is not baseline:
                self.events.trial(each, known[each.name], scores[baseline.name, n])
        if wanted:
            self.events.save(self._states)
        for each in trials:
            each.record(scores[each.name, n])
        own = [scores[each.name, n] for each in trials]
        return scores[baseline.name, n], [each if math.isfinite(each.score) else None for each in own]

    def _along(self, i: int, seed: int, share: float, stage: str) -> Trial:
        direction = self._directions_of(seed)[i]
        return self._make_trial(direction, seed, direction.at(share), stage, f"{share:.6g}")

    def _make_trial(
        self, direction: Direction, seed: int, tensors: dict[str, Tensor], stage: str, label: str
    ) -> Trial:
        parameter = next(self.engine.model.parameters())
        own = {
            name: each.to(parameter.device, master_dtype(parameter.dtype)) for name, each in tensors.items()
        }
        intervention = Intervention(self.method, own, positions=direction.positions)
        recipe = Recipe(epochs=1 + self.protocol.refine, patience=1, criterion=self.protocol.criterion)
        share = direction.share(tensors)
        norms = {int(name.removeprefix("layers.")): scale for name, scale in direction.scales.items()}
        return Trial(direction.layer, seed, recipe, intervention, stage, norms, share=share, label=label)

    def _tick(self, done: int, /) -> None:
        self.events.tick(done)
        self.events.pause(self._states)

    def _search_lengths(self, live: Sequence[int], best: dict[int, int], n: int) -> dict[int, Trial]:
        """The best length on the grid for each direction, and its trial; ``best`` holds and gets the places.

        The first round tries the guess, and shorter lengths where it does not help. Later ones start at the
        last one's best length and its neighbours, and go on where the best is the last one tried.
        """
        seed, grid = self.seeds[0], sorted(self.protocol.lengths)
        tried: dict[int, dict[int, Trial]] = {i: {} for i in live}
        wanted = {}
        for i in live:
            guess = math.log(max(self._directions_of(seed)[i].guess, 1e-30))
            at = best.get(i, min(range(len(grid)), key=lambda k: abs(math.log(grid[k]) - guess)))
            wanted[i] = _within(grid, (at - 1, at, at + 1) if i in best else (at,))
        known = set(best)
        while any(wanted.values()):
            made = {i: {k: self._along(i, seed, grid[k], "search") for k in own} for i, own in wanted.items()}
            baseline, _ = self._score([trial for own in made.values() for trial in own.values()], n)
            for i, own in tried.items():
                own |= made[i]
                best[i] = self._best(own)
                if i in known:
                    wanted[i] = [k for k in _within(grid, (best[i] - 1, best[i] + 1)) if k not in own]
                else:
                    last = own[min(own)]
                    helps = last.scores and self.criterion.change(last.scores[-1], baseline) < 0
                    wanted[i] = [] if helps else _within(grid, (min(own) - SHORTER,))
        scored = {i: tried[i][best[i]] for i in live if tried[i][best[i]].scores}
        if not scored:
            raise AFTError("No trial had a finite score.", "Use --dtype float32, or shorter --lengths.")
        for i in sorted(scored, key=lambda i: self.criterion.key(scored[i].scores[-1]), reverse=True):
            result = self._result([scored[i]], n)
            self._found[result.layer] = result
        return scored

    def _best(self, tried: Mapping[int, Trial]) -> int:
        """The place of the best trial; of the shortest where none is finite."""
        finite = {k: trial.scores[-1] for k, trial in tried.items() if trial.scores}
        return min(finite, key=lambda k: self.criterion.key(finite[k])) if finite else min(tried)

    def _line_search(self, i: int, seed: int, at: int, n: int) -> Trial:
        """A bracketed search for the length, between the neighbours of the best, on ``n`` documents."""
        grid = sorted(self.protocol.lengths)
        near = [math.log(grid[k]) for k in (max(at - 1, 0), min(at + 1, len(grid) - 1))]
        tried = [self._along(i, seed, grid[at], "line")]
        self._score(tried, n)

        def score(log_share: float) -> float:
            trial = self._along(i, seed, math.exp(log_share), "line")
            tried.append(trial)
            (found,) = self._score([trial], n)[1]
            return math.inf if found is None else self.criterion.key(found)[0]

        options = {"xatol": PRECISION, "maxiter": LINE_SEARCH - 1}
        minimize_scalar(score, bounds=near, method="bounded", options=options)
        finite = sorted((t for t in tried if t.scores), key=lambda t: self.criterion.key(t.scores[-1]))
        for best in finite:  # the first that is finite on all documents
            (found,) = self._score([best], len(self.selection))[1]
            if found is not None:
                direction = self._directions_of(seed)[i]
                final = self._make_trial(direction, seed, best.intervention.tensors, "final", best.label)
                final.record(found)
                return final
        raise AFTError("No trial had a finite score.", "Use --dtype float32, or shorter --lengths.")

    def _refine(self, final: Trial, i: int, n: int) -> Trial:
        """Quasi-Newton steps (L-BFGS) on the gradient of all training documents, while selection improves.

        The first pair of differences is the way from v = 0, whose gradient the pass gave. A step that makes
        the first ``n`` selection documents worse is not scored on the others.
        """
        if self.random:
            return final  # it would no longer be random
        seed, direction = final.seed, self._directions_of(final.seed)[i]
        names = list(direction.tensors)
        own = [self._passes[seed].layers.index(int(name.removeprefix("layers."))) for name in names]
        at = torch.zeros(len(names), self.engine.backbone.hidden_size).double()
        slope = self._passes[seed].mean(direction.positions)[own].double()
        pairs: list[tuple[Tensor, Tensor]] = []
        present = self._make_trial(direction, seed, final.intervention.tensors, "line", final.label)
        while not final.stopped:
            now = torch.stack([final.intervention.tensors[name].cpu() for name in names]).double()
            new = self._slope(final, names).double()
            pairs.append((now - at, new - slope))
            at, slope = now, new
            step = -_inverse_hessian(pairs, slope)
            tried: list[tuple[Trial, Score]] = []
            for factor in FACTORS:
                moved = dict(zip(names, at + factor * step, strict=True))
                label = f"step{final.epoch}-{factor:g}"
                trial = self._make_trial(direction, seed, moved, "refine", label)
                _, (some, before) = self._score([trial, present], n)
                if some is None or (before is not None and self.criterion.improves(before, some)):
                    continue
                _, (found,) = self._score([trial], len(self.selection))
                if found is not None:
                    tried.append((trial, found))
                    if self.criterion.improves(found, final.scores[-1]):
                        break
            if not tried:
                final.stopped = "no step does better"
                break
            present, found = min(tried, key=lambda each: self.criterion.key(each[1]))
            final.intervention = present.intervention
            last = final.best_score
            final.record(found)
            if final.best_epoch == final.epoch:
                final.share = present.share
            if last is not None and final.best_score is not None and not final.stopped:
                gained = self.criterion.change(last, final.best_score)
                if gained < WORTHWHILE * abs(self.criterion.key(final.best_score)[0]):
                    final.stopped = "the last step gained little"
        return final

    def _slope(self, final: Trial, names: Sequence[str]) -> Tensor:
        """Gradient of the mean training loss at a trial's vector, (layers, hidden_size)."""
        key = f"{final.name.replace('/', '-')}-{final.epoch}"
        if key not in self.progress.slopes:
            documents = self.train[final.seed][self.workers.rank :: self.workers.size]
            if isinstance(self.engine, Trajectory):
                documents = by_length(documents, self.engine.packed)
            tensors = {name: each.detach().clone() for name, each in final.intervention.tensors.items()}
            probe = _Probe(final.layer, final.seed, Recipe(), replace(final.intervention, tensors=tensors))
            objective = at_temperature(self.engine.objective, final.scores[-1].temperature)
            with _objective(self.engine, objective):
                self.engine.train([probe], [documents], self.events.tick)
            slopes = [tensors[name].grad for name in names]  # none in a process without documents
            zero = torch.zeros(self.engine.backbone.hidden_size)
            mine = torch.stack([zero if slope is None else slope.cpu() for slope in slopes])
            parts = self.workers.gather(mine * len(documents))
            self.progress.slopes[key] = torch.stack(parts).sum(0) / len(self.train[final.seed])
        return self.progress.slopes[key]

    def _result(self, group: list[Trial], n: int) -> LayerResult:
        best = {trial.name: self.criterion.best(trial.scores) for trial in group}
        return LayerResult(
            group[0].layer,
            group[0].stage,
            *mean_of_seeds(list(best.values())),
            self.baseline(n),
            tuple(sorted(group, key=lambda trial: self.criterion.key(best[trial.name]))),
        )


SHORTER = 2  # places on the grid
PRECISION = 0.15  # of a line search, in the logarithm of the length: the score is flat there
WORTHWHILE = 0.005  # of the present score: a step that improves it by less is the last
FACTORS = (1.0, 0.5, 0.25)  # of a quasi-Newton step, the next one where the last does not help


@dataclass
class SearchState:
    """What a run has learnt so far, from which it resumes: trials' scores, and gradients away from v = 0."""

    name = "trials"  # in state files
    scores: dict[tuple[str, int], Score] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        finite = {key: math.isfinite(score.score) for key, score in self.scores.items()}  # JSON has no NaN
        scores = [[*key, score.to_dict() if finite[key] else None] for key, score in self.scores.items()]
        return dict(self.slopes), {"scores": scores, "stopped": "", "steps": 0}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.slopes = dict(tensors)
        lost = {"score": math.nan, "cross_entropy": math.nan, "accuracy": 0.0, "temperature": 1.0}
        self.scores = {(name, n): Score(**(score or {**lost, "n": n})) for name, n, score in values["scores"]}


def at_temperature(objective: Any, temperature: float) -> Any:
    """The objective with option scores divided by a temperature, as the selection score has them.

    An overconfident model's gradients are those of its worst documents; at the temperature that fits it every
    document has its say. Losses of tokens, and margins, which are in nats, stay as they are.
    """
    parts = getattr(objective, "objectives", None)
    changed = copy.copy(objective)
    if parts is not None:
        changed.objectives = [at_temperature(each, temperature) for each in parts]
    if objective.loss is not None and objective.loss.name == "cross-entropy":
        changed.loss = replace(objective.loss, temperature=temperature)
    return changed


@contextmanager
def _objective(engine: Any, objective: Any) -> Iterator[None]:
    """Inside the block the engine has this objective."""
    before, engine.objective = engine.objective, objective
    try:
        yield
    finally:
        engine.objective = before


def _within(grid: Sequence[float], places: Sequence[int]) -> list[int]:
    """The places that the grid has."""
    return [k for k in places if 0 <= k < len(grid)]


def _random_vector(seed: int, width: int, layer: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(1000003 * seed + layer))


def _inverse_hessian(pairs: Sequence[tuple[Tensor, Tensor]], slope: Tensor) -> Tensor:
    """L-BFGS's approximation of the inverse Hessian times a gradient (Nocedal and Wright, algorithm 7.4)."""
    usable = [(s, y) for s, y in pairs if float((s * y).sum()) > 0]
    found, kept = slope.clone(), []
    for s, y in reversed(usable):
        factor = (s * found).sum() / (s * y).sum()
        found = found - factor * y
        kept.append(factor)
    if usable:
        s, y = usable[-1]
        found = found * (s * y).sum() / (y * y).sum()
    for (s, y), factor in zip(usable, reversed(kept), strict=True):
        found = found + s * (factor - (y * found).sum() / (s * y).sum())
    return found


def one_pass(prepared: Prepared, engine: Engine, **parts: Any) -> OnePass:
    """The run of a prepared plan whose protocol has no optimiser."""
    plan = prepared.plan
    if not isinstance(engine, Trajectory | Reference):
        raise TypeError(f"{type(engine).__name__} gives no gradients.")
    return OnePass(
        engine,
        plan.protocol,
        [prepared.layers] if prepared.method.steers_all_layers else [[layer] for layer in prepared.layers],
        method=prepared.method,
        positions=list(POSITIONS) if plan.positions == "auto" else [plan.positions],
        random=plan.control == "random",
        **parts,
    )
