"""What a dry run says a run will cost: within its own budget of time, and near what the run then takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_eval_aft.engine.batching import TokenizedDocument, make_batch
from lm_eval_aft.engine.checks import rows_may_be_packed
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.hooks import hidden_states
from lm_eval_aft.training import cost as cost_module
from lm_eval_aft.training.candidate import Candidate
from lm_eval_aft.training.cost import (
    BESIDES,
    LEAST,
    LEVELS,
    MOST,
    SHARE,
    STEADY,
    Estimate,
    PeakMemory,
    Size,
    UpperBlocks,
    flops_of,
)
from lm_eval_aft.training.recipe import Stage, TrainingPlan
from lm_eval_aft.training.run import cost, run
from lm_eval_aft.training.setup import Prepared, prepare
from lm_eval_aft.training.trainer import Trajectory, make_engine
from tests.engine.test_engine import documents, nothing
from tests.support.families import tiny_model


@pytest.fixture
def lm(checkpoint: Callable[..., str]) -> AFTLM:
    return AFTLM(checkpoint("llama"), device="cpu", batch_size=4)


@pytest.fixture
def settings(toy_tasks: Callable[..., str]) -> dict[str, Any]:
    return {"include_path": (toy_tasks(),), "train_docs": 20, "selection_docs": 20, "seeds": 1}


class Clock:
    """A clock that only passes through blocks move, by so many seconds for each token and block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pace: float) -> None:
        self.now, self.pace = 0.0, pace
        self.passes = 0
        monkeypatch.setattr(cost_module, "clock", lambda: self.now)
        for name, factor in (("step", 2), ("read", 1), ("bare_step", 2), ("bare_read", 1)):
            self._patch(monkeypatch, name, factor)

    def _patch(self, monkeypatch: pytest.MonkeyPatch, name: str, factor: int) -> None:
        real = getattr(UpperBlocks, name)

        def slow(engine: UpperBlocks, candidate: Candidate, batch: Any) -> Any:
            above = len(engine.backbone.blocks) - 1 - candidate.layer
            self.now += factor * self.pace * above * batch.inputs["input_ids"].numel()
            self.passes += 1
            return real(engine, candidate, batch)

        monkeypatch.setattr(UpperBlocks, name, slow)


@pytest.mark.parametrize("pace", [1e-6, 1e-4, 1e-2, 1e2])
def test_measuring_keeps_its_budget_at_any_size(
    lm: AFTLM, settings: dict[str, Any], pace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(lm, TrainingPlan.of("toy_choice", "full", **settings))
    clock = Clock(monkeypatch, pace)
    found = cost(prepared)
    # The first level is measured whatever it takes: a block and some 32 tokens, counted and then timed, in
    # passes over training and selection documents and (twice as long) in a step. Short passes are repeated.
    first, repeats = 2 * 4 * pace * 1.5 * LEVELS[0][0], 9 * 2 * STEADY
    assert clock.passes > 0
    assert clock.now <= max(first, min(MOST, max(LEAST, SHARE * found.seconds))) + repeats


def test_the_estimate_adds_up_tokens_and_blocks(
    lm: AFTLM, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a sum by hand over all documents and layers."""
    from lm_eval_aft.harness.examples import encode

    plan = TrainingPlan.of("toy_choice", "rapid", **{**settings, "layers": "0-2", "epochs": 2})
    prepared = prepare(lm, plan)
    pace, depth = 1e-4, len(prepared.backbone.blocks)
    train, selection = encode(prepared.splits.train(0), lm), encode(prepared.splits.selection, lm)
    checked = 0  # tokens x blocks that choosing the engine takes

    def count(_block: Any, _inputs: Any, output: Any) -> None:
        nonlocal checked
        checked += hidden_states(output)[..., 0].numel()

    hooks = [block.register_forward_hook(count) for block in prepared.backbone.blocks]
    engine, name = make_engine(lm.model, prepared.backbone, prepared.objective, [*train, *selection])
    for hook in hooks:
        hook.remove()
    assert (name, depth) == ("packed", 4)
    assert isinstance(engine, Trajectory)
    trained = sum(Size.of([document], True).tokens for document in train)
    judged = sum(batch.inputs["input_ids"].numel() for batch in engine.batches(selection))
    above = 3 + 2 + 1
    by_hand = 2 * (trained * (depth + 2 * above) + judged * (depth + above)) + judged * depth + checked
    Clock(monkeypatch, pace)
    found = cost(prepared)
    assert found.seconds == pytest.approx(by_hand * pace + BESIDES, rel=0.1)  # means over lengths and padding
    assert found.least == found.most == pytest.approx(found.seconds)


def test_operations_and_memory_are_those_of_a_run(lm: AFTLM, settings: dict[str, Any]) -> None:
    from lm_eval_aft.harness.examples import encode

    plan = TrainingPlan.of("toy_choice", "rapid", **{**settings, "layers": "all", "epochs": 1})
    prepared = prepare(lm, plan)
    train, selection = encode(prepared.splits.train(0), lm), encode(prepared.splits.selection, lm)
    engine, _ = make_engine(lm.model, prepared.backbone, prepared.objective, [*train, *selection])

    def once() -> None:
        group = [_candidate(prepared, layer) for layer in prepared.sites]
        engine.train(group, [[document] for document in train], nothing)
        engine.evaluate(group, selection, nothing)

    found = cost(prepared)
    # The frozen pass's head at one position is not counted, and lengths are means.
    assert found.flops == pytest.approx(flops_of(once), rel=0.03)
    with PeakMemory() as memory:
        once()
    assert memory.peak / 1.6 <= found.peak_bytes <= 1.6 * memory.peak


def _candidate(prepared: Prepared, layer: int) -> Candidate:
    from lm_eval_aft.training.run import _probe

    return _probe(prepared, layer)


@pytest.mark.parametrize("method", ["drab", "mlp", "all-layers", "caa", "scale"])
def test_every_method_can_be_estimated(lm: AFTLM, settings: dict[str, Any], method: str) -> None:
    static, other = (
        cost(prepare(lm, TrainingPlan.of("toy_choice", "rapid", layers="all", method=each, **settings)))
        for each in ("static", method)
    )
    assert other.seconds > 0
    if method in ("caa", "all-layers"):  # nothing trained, or one candidate
        assert other.flops < static.flops
    else:
        assert other.flops >= static.flops


@pytest.mark.parametrize("protocol", ["adaptive", "optimized", "maximum", "full", "onepass"])
@pytest.mark.parametrize("task", ["toy_choice", "toy_generate"])
def test_every_protocol_can_be_estimated(
    lm: AFTLM, settings: dict[str, Any], protocol: str, task: str
) -> None:
    found = cost(prepare(lm, TrainingPlan.of(task, protocol, **settings)))
    assert found.least is not None
    assert found.most is not None
    assert 0 < found.least <= found.seconds <= found.most
    assert found.least < found.most  # all of these may stop early


@pytest.mark.parametrize("family", ["bloom", "gpt_neox", "gemma2", "mamba"])
def test_families_whose_rows_are_not_packed(
    family: str, checkpoint: Callable[..., str], settings: dict[str, Any]
) -> None:
    lm = AFTLM(checkpoint(family), device="cpu", batch_size=4)
    found = cost(prepare(lm, TrainingPlan.of("toy_choice", "rapid", **settings)))
    assert found.seconds > 0
    assert found.flops > 0


def test_blocks_that_cannot_be_run_alone_are_timed_as_the_plain_engine_runs_them(
    lm: AFTLM, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(lm, TrainingPlan.of("toy_choice", "rapid", **settings))
    resumed = cost(prepared)

    def refuses(*_: Any) -> Any:
        raise TypeError("no")

    monkeypatch.setattr(Trajectory, "steered", refuses)
    whole = cost(prepared)
    assert whole.flops > resumed.flops  # every candidate runs every block, and every option its context


def test_shared_few_shot_examples_are_worth_a_packed_row() -> None:
    model = tiny_model("llama")
    shots = tuple(range(2, 42))
    docs = [TokenizedDocument((((*shots, 50 + i), (60, 61)),), group=0) for i in range(4)]
    assert rows_may_be_packed(model, docs)
    assert not rows_may_be_packed(model, [replace(doc, group=None) for doc in docs])


def test_sizes_are_those_of_the_batches() -> None:
    for packed in (True, False):
        docs = documents()
        batch = make_batch(docs, packed, torch.device("cpu"), torch.float32)
        size = Size.of(docs, packed)
        assert size.tokens == batch.inputs["input_ids"].numel()
        assert size.scored == len(batch.scored)


def test_what_may_stop_early_is_said() -> None:
    import click
    from click.testing import CliRunner

    from lm_eval_aft.cli.train import print_cost

    def printed(found: Estimate) -> str:
        return CliRunner().invoke(click.command()(lambda: print_cost(found)), []).output

    assert "About 10 min on this machine" in printed(Estimate(600, 1e12, 2**20, 400, 900))
    assert "(7 min to 15 min" in printed(Estimate(600, 1e12, 2**20, 400, 900))
    assert "stop early" not in printed(Estimate(600, 1e12, 2**20, 600, 600))


def test_a_pass_for_all_layers_is_one_step() -> None:
    from lm_eval_aft.training.cost import Rates, Spent

    one = Spent(1.0, 10.0)
    rates = Rates(one, one, one, one, gradients=Spent(5.0, 50.0))
    assert rates.total([Stage("pass", 1, 3, 0, 1, 4)], seeds=1).seconds == 15
    assert replace(rates, gradients=None).total([Stage("pass", 1, 3, 0, 1, 4)], seeds=1).flops == 60


@pytest.mark.full  # it compares times, which other work on the machine can change
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("protocol", "fixed"), [("adaptive", {"epochs": 4}), ("rapid", {}), ("onepass", {"refine": 2})]
)
def test_a_run_takes_what_its_dry_run_says(
    protocol: str, fixed: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the demo, in seconds of CPU, so that other processes do not count.

    Nothing stops much earlier than it may: how soon candidates do is not known beforehand.
    """
    monkeypatch.setattr(cost_module, "clock", time.process_time)
    lm = AFTLM("demo", device="cpu", batch_size=32)
    sizes = {"train_docs": 64, "selection_docs": 128, "retries": 0 if protocol == "adaptive" else None}
    prepared = prepare(lm, TrainingPlan.of("aft_demo_choice", protocol, **sizes, **fixed))
    found = cost(prepared)
    started = time.process_time()
    run(prepared, tmp_path / "out", progress=False, picture=False)
    spent = time.process_time() - started
    assert found.seconds / 1.5 <= spent <= 1.5 * found.seconds, (spent, found)
