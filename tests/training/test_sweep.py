"""Protocols and the sweep, on an engine whose scores are made up: which candidates go how far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.training.candidate import Candidate, Recipe, Tick, absolute
from lm_eval_aft.training.recipe import PROTOCOLS, Protocol, find_protocol, parse_rungs, schedule
from lm_eval_aft.training.selection import CRITERIA, Criterion, Score
from lm_eval_aft.training.setup import small_random
from lm_eval_aft.training.sweep import Sweep, SweepResult

DOCS = [TokenizedDocument((((i,), (1,)),)) for i in range(64)]


def score(value: float, n: int = 64, accuracy: float = 0.5) -> Score:
    return Score(value, value, accuracy, 1.0, n, 0.01)


@dataclass
class Scripted:
    """An engine that counts its work; ``quality`` says how good a candidate is after so many epochs."""

    quality: Any
    baseline_score: float = 1.0
    trained: dict[str, int] = field(default_factory=dict)
    judged: dict[str, int] = field(default_factory=dict)

    def train(
        self, candidates: Sequence[Candidate], steps: Sequence[Sequence[TokenizedDocument]], tick: Tick
    ) -> None:
        for candidate in candidates:
            with torch.no_grad():
                candidate.vector.fill_(candidate.epoch + 1.0)
            self.trained[candidate.name] = self.trained.get(candidate.name, 0) + sum(map(len, steps))

    def evaluate(
        self, candidates: Sequence[Candidate], documents: Sequence[TokenizedDocument], tick: Tick
    ) -> list[Score]:
        for candidate in candidates:
            self.judged[candidate.name] = self.judged.get(candidate.name, 0) + len(documents)
        return [score(self.quality(c, c.epoch + 1), len(documents)) for c in candidates]

    def baseline(self, documents: Sequence[TokenizedDocument], tick: Tick) -> Score:
        return score(self.baseline_score, len(documents))


class Silent:
    def __init__(self) -> None:
        self.epochs: list[tuple[str, int]] = []
        self.ticked = 0

    def tick(self, done: int, /) -> None:
        self.ticked += done

    def epoch(self, candidate: Candidate, baseline: Score) -> None:
        self.epochs.append((candidate.name, candidate.epoch))

    def save(self, candidates: Iterable[Candidate]) -> None:
        pass

    def pause(self, candidates: Iterable[Candidate]) -> None:
        pass


def run(engine: Scripted, protocol: Protocol, layers: Sequence[int] = range(6)) -> SweepResult:
    seeds = range(protocol.seeds)
    train = {seed: list(DOCS) for seed in seeds}

    def start(layer: int, _seed: int, noise: int | None) -> Intervention:
        vector = torch.zeros(4) if noise is None else small_random(4, 1.0, noise)
        return Intervention.static(layer, vector)

    parts: dict[str, Any] = {"seeds": seeds, "train": train, "selection": DOCS, "events": Silent()}
    norms = dict.fromkeys(layers, 2.0)  # so that 0.01r is 0.01 at the vectors' width of 4
    return Sweep(engine, protocol, list(layers), start=start, norms=norms, **parts).run()


def by_layer(candidate: Candidate, epoch: int) -> float:
    """Layer 4 is best, then its neighbours; the larger rate is better; each epoch helps a little."""
    return 0.5 + 0.05 * abs(candidate.layer - 4) - absolute(candidate.recipe.lr, 1.0) - 0.001 * epoch


ADAPTIVE = find_protocol("adaptive")


def test_halving_finds_the_best_layer_with_a_fraction_of_the_work() -> None:
    engine = Scripted(by_layer)
    result = run(engine, ADAPTIVE)
    assert (result.chosen.layer, result.finalist.recipe.lr) == (4, "0.1r")
    assert result.pruned == ""
    stages = schedule(ADAPTIVE, 6, 64, 64)
    trained = sum(engine.trained.values())
    assert trained == sum(s.candidates * s.epochs * s.train for s in stages)
    assert sum(engine.judged.values()) == sum(s.candidates * s.epochs * s.selection for s in stages)
    everything = 6 * 5 * 10 * 64 + 8 * 64 + 6 * 10 * 64  # all settings to the end, penalties, seeds
    assert trained < everything / 3
    # Every layer is reported, with the documents it was judged on.
    assert [layer.layer for layer in result.layers] == list(range(6))
    assert {layer.baseline.n for layer in result.layers} == {16, 32, 64}
    assert {layer.stage for layer in result.layers} == {"search", "penalty", "final"}


def test_the_same_layer_as_the_exhaustive_sweep() -> None:
    exhaustive = run(Scripted(by_layer), ADAPTIVE.changed({"rungs": (), "l2": 0.0}))
    thinned = run(Scripted(by_layer), ADAPTIVE)
    assert thinned.chosen.layer == exhaustive.chosen.layer
    assert thinned.chosen.score == pytest.approx(exhaustive.chosen.score, rel=0.01)


def test_optimized_sweeps_three_epochs_and_finishes_the_best() -> None:
    engine = Scripted(by_layer)
    result = run(engine, find_protocol("optimized"))
    assert result.chosen.layer == 4
    epochs = {name: n // len(DOCS) for name, n in engine.trained.items()}
    assert sorted(set(epochs.values())) == [3, 10]
    assert [name for name, n in epochs.items() if n == 10] == ["final/layer4-seed0-lr0.001-l20"]


@pytest.mark.parametrize(("name", "candidates"), [("rapid", 6), ("maximum", 18), ("full", 90)])
def test_protocols_without_search_train_everything(name: str, candidates: int) -> None:
    protocol = find_protocol(name)
    engine = Scripted(by_layer)
    run(engine, protocol)
    assert len(engine.trained) == candidates
    assert {n // len(DOCS) for n in engine.trained.values()} == {protocol.epochs}


def test_patience_waits_for_min_epochs() -> None:
    def worse_and_worse(candidate: Candidate, epoch: int) -> float:
        return 0.5 + epoch

    for patience, least, expected in ((1, 3, 3), (1, 1, 2), (3, 1, 4), (0, 1, 10)):
        engine = Scripted(worse_and_worse)
        run(
            engine,
            find_protocol("maximum").changed(
                {"patience": patience, "min_epochs": least, "regression": False}
            ),
            [0],
        )
        assert set(engine.trained.values()) == {expected * len(DOCS)}


def test_regression_stops_a_candidate_and_its_best_vector_is_kept() -> None:
    def falls_behind(candidate: Candidate, epoch: int) -> float:
        return 0.8 if epoch == 1 else 1.2 if candidate.seed == 0 else 0.7

    protocol = find_protocol("maximum").changed({"epochs": 4, "patience": 0})
    result = run(Scripted(falls_behind), protocol, [2])
    stopped = {c.seed: (c.stopped, c.epoch, c.best_epoch) for c in result.chosen.candidates}
    assert stopped[0] == ("regression: worse than the baseline", 2, 1)
    assert stopped[1] == ("all epochs done", 4, 2)
    (first,) = [c for c in result.chosen.candidates if c.seed == 0]
    assert first.best is not None
    assert first.best["layers.2"].tolist() == [1.0] * 4  # after one epoch


def test_a_negative_result_is_retried_at_the_next_layers_and_can_be_rescued() -> None:
    def only_from_noise(candidate: Candidate, epoch: int) -> float:
        return 0.9 if candidate.stage == "retry-2" else 1.1 + 0.01 * abs(candidate.layer - 3)

    engine = Scripted(only_from_noise)
    result = run(engine, find_protocol("maximum"))
    assert (result.retries, result.pruned, result.chosen.stage) == (2, "", "retry-2")
    assert result.chosen.layer in (2, 4)  # the first retry was at layer 3, the best
    assert {name.split("/")[1].split("-")[0] for name in engine.trained if name.startswith("retry-1")} == {
        "layer3"
    }
    assert not any(name.startswith("retry-3") for name in engine.trained)


def test_a_pair_that_never_helps_is_pruned_with_a_reason_and_still_reported() -> None:
    result = run(Scripted(lambda c, e: 1.1), find_protocol("maximum"))
    assert result.retries == 3
    assert result.pruned == "no better than the baseline on the selection split after 3 retries"
    assert [layer.change for layer in result.layers] == pytest.approx([0.1] * 6)


def test_retries_start_from_small_random_vectors_of_their_own() -> None:
    one, same, other = small_random(4096, 20.0, 1), small_random(4096, 20.0, 1), small_random(4096, 20.0, 2)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.norm()) == pytest.approx(0.1 * 20.0, rel=0.05)  # N(0, 0.01 * 20^2 / 4096) each


def test_choice_is_by_the_mean_not_by_the_luckiest_seed() -> None:
    scores = {0: [0.1, 0.9, 0.9], 1: [0.5, 0.6, 0.4]}
    result = run(
        Scripted(lambda c, e: scores[c.layer][c.seed]),
        find_protocol("maximum").changed({"epochs": 1}),
        [0, 1],
    )
    assert result.chosen.layer == 1
    assert result.finalist.seed == 0  # the median of 0.4, 0.5, 0.6


def test_a_layer_with_a_diverging_seed_is_out() -> None:
    def diverges(candidate: Candidate, epoch: int) -> float:
        return float("nan") if (candidate.layer, candidate.seed) == (1, 2) else 0.5 - 0.1 * candidate.layer

    result = run(Scripted(diverges), find_protocol("maximum"), [0, 1])
    assert [layer.layer for layer in result.layers] == [0]
    with pytest.raises(AFTError, match="Every layer diverged"):
        run(Scripted(lambda c, e: float("inf")), find_protocol("maximum"), [0, 1])


def test_the_design_table() -> None:
    """Settings of the five protocols that other documents refer to."""
    names = ("rapid", "optimized", "maximum", "adaptive", "full")
    rapid, optimized, maximum, adaptive, full = (PROTOCOLS[name] for name in names)
    assert (rapid.layers, rapid.train_docs, rapid.epochs, rapid.patience) == ("25%-75%:2", 50, 3, None)
    assert (rapid.seeds, rapid.lr, rapid.l2, optimized.seeds) == (1, (1e-3,), (0.0,), 1)
    assert (optimized.layers, optimized.train_docs, optimized.epochs) == ("20%-80%", 100, 10)
    assert (optimized.patience, maximum.patience, adaptive.patience, full.patience) == (3, 3, 3, 3)
    assert (optimized.clip, optimized.batch_size, optimized.rungs[0].epochs) == (1.0, 1, 3)
    assert (maximum.layers, maximum.train_docs, maximum.l2, maximum.seeds) == ("all", 100, (1e-3,), 3)
    assert (maximum.regression, maximum.retries) == (True, 3)
    assert (adaptive.train_docs, adaptive.min_epochs, adaptive.epochs, adaptive.retries) == (500, 3, 10, 3)
    assert [p.share_fewshot for p in (rapid, optimized, maximum, adaptive, full)] == [1, 1, 1, 8, 1]
    assert adaptive.lr == full.lr == ("0.001r", "0.003r", "0.01r", "0.03r", "0.1r")
    assert adaptive.l2 == (0.0, "0.0001r", "0.001r", "0.01r")
    assert (full.train_docs, full.rungs, full.l2, full.seeds) == (400, (), ("0.001r",), 3)
    assert all(p.selection_docs == 500 for p in PROTOCOLS.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.0},
        {"lr": ()},
        {"lr": "0r"},
        {"lr": ["-0.1r"]},
        {"lr": "infr"},
        {"lr": "r"},
        {"lr": ["1e-3", "fast"]},
        {"l2": "nanr"},
        {"l2": -1.0},
        {"epochs": 0},
        {"seeds": 0},
        {"share_fewshot": 0},
        {"clip": -1.0},
        {"nonsense": 1},
    ],
)
def test_impossible_settings(changes: dict[str, Any]) -> None:
    with pytest.raises(AFTError):
        ADAPTIVE.changed(changes)


def test_changes_and_rungs_in_writing() -> None:
    changed = ADAPTIVE.changed({"lr": 0.5, "patience": 0, "clip": 0.0, "epochs": None})
    assert (changed.lr, changed.patience, changed.clip, changed.epochs) == ((0.5,), None, None, 10)
    text = ",".join(map(str, ADAPTIVE.rungs))
    assert [str(r) for r in parse_rungs(text)] == [str(r) for r in ADAPTIVE.rungs]
    assert parse_rungs("none") == ()
    for wrong in ("1:1:1", "0:1:1:1", "1:1:x:1", "1:1:0:1", "2:1:1:1", ""):
        with pytest.raises(AFTError):
            parse_rungs(wrong)
    with pytest.raises(AFTError, match="Choose one of"):
        find_protocol("turbo")


def test_rates_in_writing() -> None:
    """Flags, study files and Python give the same protocol, in one spelling."""
    for given in ("0.0100r, 1e-3", ["0.01r", "0.001"], ("1e-2r", 1e-3)):
        changed = ADAPTIVE.changed({"lr": given, "l2": "1e-2r"})
        assert (changed.lr, changed.l2) == (("0.01r", 1e-3), ("0.01r",))
        assert changed.to_dict()["lr"] == ["0.01r", 1e-3]
    with pytest.raises(AFTError, match=r"relative to the hidden states: 0\.003r") as found:
        ADAPTIVE.changed({"lr": "0.1%"})
    assert "Cannot read the numbers '0.1%'" in found.value.what


def test_recipe_is_checked() -> None:
    with pytest.raises(AFTError):
        Recipe(lr=-1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 0}, "epochs=0 is invalid.\nepochs should be greater than or equal to 1."),
        ({"epochs": True}, "epochs=True is invalid.\nepochs should be a valid integer."),
        ({"lr": -1.0}, "lr=-1.0 is invalid.\nlr should be greater than 0."),
        ({"l2": float("nan")}, "l2=nan is invalid.\nl2 should be a finite number."),
        ({"layers": 3}, "layers=3 is invalid.\nlayers should be a valid string."),
        ({"criterion": "luck"}, "There is no criterion 'luck'.\nChoose one of: cross-entropy."),
    ],
    ids=str,
)
def test_a_bad_setting_is_told_in_one_line_each(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(AFTError) as found:
        ADAPTIVE.changed(changes)
    assert str(found.value) == told


def test_numbers_stay_as_they_were_given() -> None:
    """Digests of settings, which earlier versions have written, tell 1 from 1.0."""
    found = ADAPTIVE.changed({"clip": 1}).to_dict()
    assert type(found["clip"]) is int
    assert "criterion" not in found


def test_every_choice_follows_the_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA, "contrary", Criterion("contrary", lambda score: (-score.score,)))
    contrary = ADAPTIVE.changed({"criterion": "contrary"})
    result = run(Scripted(by_layer, baseline_score=0.0), contrary)
    assert (result.chosen.layer, result.finalist.recipe.lr) == (0, "0.001r")  # the highest cross-entropy
    assert {candidate.best_epoch for candidate in result.chosen.candidates} == {1}
    assert (result.chosen.improves, result.retries, result.pruned) == (True, 0, "")
    assert contrary.to_dict()["criterion"] == "contrary"


@dataclass
class Counting(Scripted):
    """Ticks as engines do."""

    def train(
        self, candidates: Sequence[Candidate], steps: Sequence[Sequence[TokenizedDocument]], tick: Tick
    ) -> None:
        super().train(candidates, steps, tick)
        tick(len(candidates) * sum(map(len, steps)))

    def evaluate(
        self, candidates: Sequence[Candidate], documents: Sequence[TokenizedDocument], tick: Tick
    ) -> list[Score]:
        tick(len(candidates) * len(documents))
        return super().evaluate(candidates, documents, tick)


@pytest.mark.parametrize("name", ["adaptive", "optimized", "maximum"])
def test_a_resumed_run_counts_the_work_done_before(name: str) -> None:
    protocol = find_protocol(name)
    seeds = range(protocol.seeds)

    def sweep(saved: dict[str, Any]) -> tuple[Sweep, Silent, Counting]:
        engine, events = Counting(by_layer), Silent()
        train = {seed: list(DOCS) for seed in seeds}
        made = Sweep(
            engine, protocol, range(6), seeds=seeds, train=train, selection=DOCS, events=events, saved=saved,
            start=lambda layer, seed, noise: Intervention.static(layer, torch.zeros(4)),
        )  # fmt: skip
        made.run()
        return made, events, engine

    whole, events, engine = sweep({})
    assert events.ticked == sum(engine.trained.values()) + sum(engine.judged.values()) > 0
    states = {name: candidate.state() for name, candidate in whole.candidates.items()}
    # All of it was done, or all but some candidates'.
    for kept in (len(states), len(states) // 2):
        _, again, worked = sweep(dict(list(states.items())[:kept]))
        assert again.ticked == events.ticked
        assert (sum(worked.trained.values()) == 0) == (kept == len(states))
