"""The protocol ``onepass``: its gradients against autograd's, its search, its controls."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm_eval_aft import AFTError, load_vector, train_vector
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.harness.examples import PromptSettings, encode
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.intervention import POSITIONS, Intervention
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.training import gradients, onepass, trainer
from lm_eval_aft.training.candidate import Candidate, Recipe, Workers
from lm_eval_aft.training.checkpoint import RunRecorder
from lm_eval_aft.training.gradients import Gradients
from lm_eval_aft.training.objectives import LM, Choice, Objective
from lm_eval_aft.training.onepass import OnePass, directions
from lm_eval_aft.training.recipe import Rung, TrainingPlan
from lm_eval_aft.training.setup import prepare
from lm_eval_aft.training.trainer import Reference, Trajectory, make_engine
from tests.engine.test_engine import documents, nothing, single
from tests.support.families import FAMILIES, tiny_model
from tests.support.processes import by_one_and_by_two

OFTEN = ("llama", "gemma2", "bloom")  # packed, behind a window, never packed
# Its recurrence leaves both gradients up to 5e-4 away from those in float64.
IN_DOUBLE = {"mamba"}
BY_TIER = [
    pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.slow])
    for name, family in FAMILIES.items()
    if not family.kind.startswith("encoder")  # nothing to steer
]


def by_autograd(
    model: Any, objective: Objective, docs: Sequence[TokenizedDocument], positions: str
) -> list[torch.Tensor]:
    """Each block's gradient of the mean loss at v = 0, for vectors added by the hooks that steer."""
    backbone = find_backbone(model)
    reference = Reference(model, backbone, objective)
    zeros = {
        f"layers.{i}": torch.zeros(backbone.hidden_size, dtype=model.dtype)
        for i in range(len(backbone.blocks))
    }
    probe = Candidate(0, 0, Recipe(), Intervention(METHODS["all-layers"], zeros, 1.0, positions))
    total = sum(objective.losses(*reference.logits(doc, probe)).sum() for doc in docs) / len(docs)
    return list(torch.autograd.grad(total, list(zeros.values())))


@pytest.mark.parametrize("objective", [Choice("acc"), Choice("acc_norm"), LM()], ids=lambda o: o.metric)
@pytest.mark.parametrize("family", BY_TIER)
def test_the_pass_equals_autograd(family: str, objective: Objective) -> None:
    model = tiny_model(family, dtype=torch.float64 if family in IN_DOUBLE else None)
    backbone = find_backbone(model)
    docs = single() if objective.name == "lm" else documents()
    engine, _ = make_engine(model, backbone, objective, docs)
    found = Gradients(engine, docs, range(len(backbone.blocks)), list(POSITIONS)).run(nothing)
    for positions in POSITIONS:
        expected = by_autograd(model, objective, docs, positions)
        for layer, (mean, own) in enumerate(zip(found.mean(positions), expected, strict=True)):
            assert float((mean - own).norm() / own.norm()) <= 1e-5, (layer, positions)


def test_parts_add_up_and_halves_share_no_document() -> None:
    model = tiny_model("llama")
    docs = documents(9)
    engine, _ = make_engine(model, find_backbone(model), Choice("acc"), docs)
    found = Gradients(engine, docs, range(4), ["all"]).run(nothing)
    one, other = found.halves("all")
    assert found.counts.tolist() == [1.0] * 9
    assert torch.allclose(found.mean("all"), (5 * one + 4 * other) / 9, atol=1e-7)
    for i, doc in enumerate(docs):
        alone = Gradients(engine, [doc], range(4), ["all"]).run(nothing)
        assert torch.allclose(found.sums["all"][i], alone.mean("all"), rtol=1e-4, atol=1e-6)


def test_memory_of_the_pass_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    docs = documents(9)
    engine, _ = make_engine(model, find_backbone(model), Choice("acc"), docs)
    whole = Gradients(engine, docs, range(4), ["all"]).run(nothing)
    monkeypatch.setattr(gradients, "PARTS", 4)
    few = Gradients(engine, docs, range(4), ["all"]).run(nothing)
    assert few.sums["all"].shape == (4, 4, 32)
    assert few.counts.sum() == 9
    assert torch.allclose(few.mean("all"), whole.mean("all"), atol=1e-6)


def test_documents_that_share_a_row_are_one_part() -> None:
    """A row's common few-shot examples belong to all of its documents."""
    model = tiny_model("llama")
    common = tuple(range(5, 45))
    docs = [
        replace(doc, pairs=tuple(((*common, *context), tail) for context, tail in doc.pairs), group=i // 3)
        for i, doc in enumerate(documents(9))
    ]
    engine, name = make_engine(model, find_backbone(model), Choice("acc"), docs)
    assert name == "packed"
    found = Gradients(engine, docs, range(4), list(POSITIONS)).run(nothing)
    assert found.counts.tolist() == [3.0] * 3
    for positions in POSITIONS:
        expected = by_autograd(model, Choice("acc"), docs, positions)[1]
        assert float((found.mean(positions)[1] - expected).norm() / expected.norm()) <= 1e-5


def test_out_of_memory_the_pass_goes_on_with_smaller_batches() -> None:
    model = tiny_model("llama")
    docs = documents(9)
    engine = Trajectory(model, find_backbone(model), Choice("acc"), packed=True)
    whole = Gradients(engine, docs, range(4), ["all"]).run(nothing).mean("all")
    forward = model.forward

    def scarce(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].numel() > 60:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(*args, **kwargs)

    model.forward = scarce
    found = Gradients(engine, docs, range(4), ["all"]).run(nothing)
    assert engine.budget < 1024
    assert torch.allclose(found.mean("all"), whole, atol=1e-6)


def test_the_plain_engine_gives_the_same_gradients() -> None:
    model = tiny_model("llama")
    docs = documents(9)
    fast, _ = make_engine(model, find_backbone(model), Choice("acc"), docs)
    plain = Reference(model, find_backbone(model), Choice("acc"))
    one, other = (Gradients(each, docs, range(4), list(POSITIONS)).run(nothing) for each in (fast, plain))
    for positions in POSITIONS:
        assert torch.allclose(other.sums[positions], one.sums[positions], rtol=1e-4, atol=1e-6)
    assert other.counts.tolist() == one.counts.tolist()


def with_rank(rank: int, size: int, others: Sequence[Any] = ()) -> Workers:
    """One of several processes; the others have found this already."""
    workers = Workers()
    workers.rank, workers.size = rank, size
    workers.gather = lambda value: [*others, value]  # type: ignore[method-assign]
    return workers


def test_processes_share_the_documents_and_resume_together() -> None:
    model = tiny_model("llama")
    docs = documents(6)
    engine = Trajectory(model, find_backbone(model), Choice("acc"), packed=True, budget=1)  # a document each
    whole = Gradients(engine, docs, range(4), ["all"]).run(nothing)
    first = Gradients(engine, docs, range(4), ["all"], workers=with_rank(0, 2)).run(nothing)
    assert first.counts.sum() == 3
    part = (first.sums, first.counts)
    second = Gradients(engine, docs, range(4), ["all"], workers=with_rank(1, 2, [part])).run(nothing)
    assert second.counts.tolist() == whole.counts.tolist()
    assert torch.equal(second.mean("all"), whole.mean("all"))
    # The first process's state is every process's when the run goes on: the pass is over for all.
    resumed = Gradients(engine, docs, range(4), ["all"], workers=with_rank(1, 2, [part]))
    resumed.restore(*second.state())
    assert torch.equal(resumed.run(nothing).mean("all"), whole.mean("all"))
    # What a process alone has left unfinished was divided otherwise: several begin again.
    alone = Gradients(engine, docs, range(4), ["all"])
    with pytest.raises(Stop):
        alone.run(nothing, interrupt)
    again = Gradients(engine, docs, range(4), ["all"])
    again.restore(*alone.state())
    assert again.done == 1
    assert torch.equal(again.run(nothing).mean("all"), whole.mean("all"))
    shared = Gradients(engine, docs, range(4), ["all"], workers=with_rank(1, 2, [part]))
    shared.restore(*alone.state())
    assert torch.equal(shared.run(nothing).mean("all"), whole.mean("all"))


def test_frozen_outputs_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    docs = documents(9)
    engine = Trajectory(model, find_backbone(model), Choice("acc"), packed=True, budget=60)
    vector = torch.linspace(-1, 1, 32)
    probe = Candidate(2, 0, Recipe(), Intervention.static(2, vector))
    expected = engine.evaluate([probe], docs, nothing)
    passes: list[int] = []
    run_blocks = trainer._run_blocks
    monkeypatch.setattr(trainer, "_run_blocks", lambda *args: (passes.append(1), run_blocks(*args)))
    engine.keep_bytes = 1 << 20
    assert engine.evaluate([probe], docs, nothing) == expected
    batches = len(passes)
    assert batches > 2
    assert engine.evaluate([probe], docs, nothing) == expected
    assert len(passes) == batches  # none was read again
    engine.keep_bytes = 1  # nothing fits
    other = Candidate(1, 0, Recipe(), Intervention.static(1, vector))
    assert engine.evaluate([other, probe], docs, nothing)[1] == expected[0]
    passes.clear()
    assert engine.evaluate([probe], docs, nothing) == expected
    assert len(passes) == batches


def test_the_direction_is_the_steepest_for_lengths_in_residual_norms() -> None:
    """Along it the loss falls as the slope says, and its length is one residual norm."""
    model = tiny_model("llama")
    docs = documents(12)
    engine, _ = make_engine(model, find_backbone(model), Choice("acc"), docs)
    found = Gradients(engine, docs, range(4), ["all"]).run(nothing)
    norms = {0: 3.0, 1: 4.0, 2: 5.0, 3: 7.0}
    together = directions(found, norms, [[0, 1, 2, 3]])[0]
    for each in (*directions(found, norms, [[2]]), together):
        assert each.share(each.at(0.25)) == pytest.approx(0.25, rel=1e-5)
        assert each.guess > 0
    assert together.layer == 0
    # A layer's part grows with its gradient and with the square of its residual norm.
    lengths = torch.tensor([float(each.norm()) for each in together.tensors.values()])
    rates = lengths / (torch.tensor(list(norms.values())) ** 2 * found.mean("all").norm(dim=1))
    assert torch.allclose(rates, rates[0].expand(4), rtol=1e-4)


def test_the_first_guess_is_the_best_length_of_a_quadratic_loss() -> None:
    """Documents with slopes a: the model of the loss is -t mean(a) + t^2 mean(a^2) / 2."""
    sums = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]]])
    found = object.__new__(Gradients)
    found.layers, found.sums, found.counts = [0], {"all": sums}, torch.ones(2)
    (only,) = directions(found, {0: 10.0}, [[0]])
    assert only.tensors["layers.0"].tolist() == [-10.0, 0.0]
    assert only.guess == pytest.approx((30 + 10) / (30**2 + 10**2))
    assert only.gain == pytest.approx((3 * 1 * 100 / 20) ** 2 / (2 * 500))


def test_quasi_newton_steps_reach_the_minimum_of_a_quadratic() -> None:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=draw).double()
    hessian = root @ root.T + 0.1 * torch.eye(4).double()
    goal = torch.randn(4, generator=draw).double()
    at, slope, pairs = torch.zeros(4).double(), -hessian @ goal, []
    step = -slope / hessian.norm()
    for _ in range(60):
        now = at + step
        new = hessian @ (now - goal)
        pairs.append((now - at, new - slope))
        at, slope = now, new
        step = -onepass._inverse_hessian(pairs, slope)
    assert torch.allclose(at, goal, atol=1e-6)


# Whole runs.


@pytest.fixture
def settings(toy_tasks: Callable[..., str]) -> dict[str, Any]:
    return {
        "include_path": (toy_tasks(),),
        "train_docs": 20,
        "selection_docs": 24,
        "progress": False,
        "protocol": "onepass",
        "refine": 2,
    }


@pytest.fixture
def lm(checkpoint: Callable[..., str]) -> AFTLM:
    return AFTLM(checkpoint("llama"), device="cpu", batch_size=4)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


@pytest.mark.parametrize("task", ["toy_choice", "toy_generate"])
def test_a_run_keeps_the_best_and_says_what_it_tried(
    task: str, lm: AFTLM, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    result = train_vector(lm, task, folder, **settings)
    meta = load_vector(folder).metadata
    assert result.sweep is not None
    trials = events(folder, "trial")
    assert meta["protocol"]["trials"] == len({line["candidate"] for line in trials})
    assert {line["stage"] for line in trials} == {"search", "line", "refine"}
    # The best of all trials on the whole selection split is the vector, with that score.
    whole = [line for line in trials if line["n"] == 24 and line["stage"] != "search"]
    best = min(whole, key=lambda line: (line["score"], -line["accuracy"]))
    assert meta["selection"]["vector"]["score"] == best["score"]
    chosen = meta["protocol"]["chosen"]
    (layer,) = result.vector.layers
    assert chosen["layer"] == layer == best["layer"]
    assert chosen["norm"] == pytest.approx(best["norm"])
    assert chosen["share"] == pytest.approx(best["share"], rel=1e-2)
    # Each layer was searched, and every trial's length lies on the grid.
    searched = [line for line in trials if line["stage"] == "search"]
    assert {line["layer"] for line in searched} == {0, 1, 2, 3}
    assert all(
        math.log2(line["share"]) == pytest.approx(round(math.log2(line["share"])), abs=1e-4)
        for line in searched
    )


def test_no_document_is_scored_twice_with_a_vector_nor_read_twice_without(
    lm: AFTLM, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later rounds add documents; the baseline's pass serves every trial, the backward pass every step."""
    scored: list[tuple[str, TokenizedDocument]] = []
    outcomes, run_blocks = Trajectory.outcomes, trainer._run_blocks
    frozen: list[TokenizedDocument] = []

    def recorded(self: Trajectory, candidates: Any, documents: Any, tick: Any) -> list[list[Any]]:
        scored.extend((each.name, document) for each in candidates for document in documents)
        return outcomes(self, candidates, documents, tick)

    def read(model: Any, batch: Any) -> None:
        frozen.extend(batch.documents)
        run_blocks(model, batch)

    refined: list[TokenizedDocument] = []
    train = Trajectory.train

    def stepped(self: Trajectory, candidates: Any, steps: Any, tick: Any) -> None:
        refined.extend(document for step in steps for document in step)
        train(self, candidates, steps, tick)

    monkeypatch.setattr(Trajectory, "outcomes", recorded)
    monkeypatch.setattr(Trajectory, "train", stepped)
    monkeypatch.setattr(trainer, "_run_blocks", read)
    result = train_vector(lm, "toy_choice", rungs=(Rung(1, 0.4, 1, 0.5), Rung(1, 0.7, 1, 0.5)), **settings)
    assert result.sweep is not None
    assert result.sweep.notes["trials"] > 8
    assert len(scored) == len(set(scored))
    selection = [document for name, document in scored if name.startswith("baseline")]
    assert len(selection) == 24
    read_for_selection = [document for document in frozen if document in set(selection)]
    assert len(read_for_selection) == 24 + 1  # the shortest once more, to check the engine
    assert refined
    assert len([document for document in frozen if document in set(refined) - set(selection)]) <= 1


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({}, "onepass"),
        ({"method": "all-layers", "positions": "auto", "refine": 0}, "onepass"),
        ({"control": "shuffled", "objective": None, "seeds": 3}, "onepass"),
        ({"method": "mlp"}, "adaptive"),
        ({"method": "caa"}, "adaptive"),
        ({"lr": 1e-2}, "adaptive"),
        ({"screen": "order"}, "adaptive"),
        ({"lr": 1e-2, "protocol": "full"}, "full"),
    ],
)
def test_the_protocol_of_a_plan_that_names_none(asked: dict[str, Any], name: str) -> None:
    assert TrainingPlan.of("t", **asked).protocol.name == name


def test_the_line_searchs_scores_are_those_of_the_plain_engine(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path
) -> None:
    result = train_vector(lm, "toy_choice", tmp_path / "out", **settings)
    settings.pop("progress")
    prepared = prepare(lm, TrainingPlan.of("toy_choice", **settings))
    selection = encode(prepared.splits.selection, lm)
    tensors = {name: each.clone() for name, each in result.vector.tensors.items()}
    probe = Candidate(min(result.vector.layers), 0, Recipe(), Intervention(METHODS["static"], tensors))
    plain = Reference(lm.model, prepared.backbone, prepared.objective)
    said = result.vector.metadata["selection"]
    for score, claimed in (
        (plain.evaluate([probe], selection, nothing)[0], said["vector"]),
        (plain.baseline(selection, nothing), said["baseline"]),
    ):
        assert claimed["score"] == pytest.approx(score.score, rel=1e-4)
        assert claimed["accuracy"] == score.accuracy


@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_controls_have_the_same_search(
    control: str, lm: AFTLM, settings: dict[str, Any], tmp_path: Path
) -> None:
    own = train_vector(lm, "toy_choice", tmp_path / "own", **settings)
    placebo = train_vector(lm, "toy_choice", tmp_path / "placebo", control=control, **settings)
    assert placebo.vector.metadata["control"] == control
    searched = [
        {(line["layer"], line["n"]) for line in events(tmp_path / name, "trial") if line["stage"] == "search"}
        for name in ("own", "placebo")
    ]
    assert {layer for layer, n in searched[0] if n == 8} == {layer for layer, n in searched[1] if n == 8}
    # What the header says is what this very vector scored.
    said = placebo.vector.metadata["selection"]["vector"]["score"]
    assert said in {line["score"] for line in events(tmp_path / "placebo", "trial")}
    if control == "random":
        assert not [line for line in events(tmp_path / "placebo", "trial") if line["stage"] == "refine"]
    # Its directions are others.
    together = own.vector.layers.keys() & placebo.vector.layers.keys()
    for layer in together:
        pair = own.vector.layers[layer], placebo.vector.layers[layer]
        assert abs(float(torch.cosine_similarity(*pair, dim=0))) < 0.9


def test_answers_of_other_documents_are_the_control_of_generation(
    lm: AFTLM, settings: dict[str, Any]
) -> None:
    placebo = train_vector(lm, "toy_generate", control="format", **settings)
    assert placebo.vector.metadata["control"] == "format"
    assert placebo.vector.metadata["protocol"]["trials"] > 8


@pytest.mark.parametrize("positions", ["prompt", "last", "generated", "auto"])
def test_positions(positions: str, lm: AFTLM, settings: dict[str, Any]) -> None:
    result = train_vector(lm, "toy_choice", positions=positions, **settings)
    assert result.vector.positions in (POSITIONS if positions == "auto" else {positions})
    if positions == "auto":
        assert len(result.vector.metadata["protocol"]["halves_cosine"]) == 4 * len(POSITIONS)


@pytest.mark.parametrize("changes", [{"rungs": ()}, {"lengths": 0.25}], ids=["rungs", "lengths"])
def test_a_search_without_rounds_or_with_one_length(
    changes: dict[str, Any], lm: AFTLM, settings: dict[str, Any], tmp_path: Path
) -> None:
    result = train_vector(lm, "toy_choice", tmp_path / "out", **settings, **changes)
    searched = [line for line in events(tmp_path / "out", "trial") if line["stage"] == "search"]
    assert {line["layer"] for line in searched} == {0, 1, 2, 3}
    if "rungs" in changes:
        assert {line["n"] for line in searched} == {24}
    else:
        assert [line["share"] for line in searched] == pytest.approx([0.25] * len(searched))
    assert result.sweep is not None
    whole = [line["score"] for line in events(tmp_path / "out", "trial") if line["n"] == 24]
    assert result.sweep.chosen.score == min(whole)


def test_documents_that_all_share_one_row_have_no_halves(lm: AFTLM, settings: dict[str, Any]) -> None:
    settings |= {"train_docs": 8, "prompts": PromptSettings(num_fewshot=1), "layers": "1-2"}
    protocol = train_vector(lm, "toy_choice", **settings).vector.metadata["protocol"]
    assert protocol["halves_cosine"] == {}
    assert protocol["trials"] > 2


def test_all_layers_together(lm: AFTLM, settings: dict[str, Any]) -> None:
    result = train_vector(lm, "toy_choice", method="all-layers", **settings)
    assert list(result.vector.layers) == [0, 1, 2, 3]
    assert result.vector.metadata["parameters"] == 4 * 32


def test_seeds_draw_their_documents_and_their_cosines_are_told(lm: AFTLM, settings: dict[str, Any]) -> None:
    result = train_vector(lm, "toy_choice", seeds=3, **settings)
    assert sorted(result.finalists) == [0, 1, 2]
    vectors = [result.finalists[seed].layers for seed in (0, 1, 2)]
    flat = [torch.cat(list(each.values())) for each in vectors]
    cosines = result.vector.metadata["protocol"]["seeds_cosine"]
    assert cosines[0] == pytest.approx(float(torch.cosine_similarity(flat[0], flat[1], dim=0)), abs=1e-3)
    assert len(cosines) == 3
    assert max(cosines) < 0.9999  # other documents, other vectors


class Stop(Exception):
    pass


def interrupt(*_: Any) -> None:
    raise Stop


@pytest.mark.parametrize("after", [1, 3, 6, 9])
def test_a_killed_run_resumes_to_the_same_vector(
    after: int, lm: AFTLM, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["seeds"] = 2
    whole = train_vector(lm, "toy_choice", tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        saves: list[int] = []
        save = RunRecorder.save

        def stopped(self: RunRecorder, states: Any) -> None:
            save(self, states)
            saves.append(1)
            if len(saves) == after:
                raise Stop

        patch.setattr(RunRecorder, "save", stopped)
        with pytest.raises(Stop):
            train_vector(lm, "toy_choice", tmp_path / "cut", **settings)
    resumed = train_vector(lm, "toy_choice", tmp_path / "cut", resume=True, **settings)
    assert resumed.vector.tensors.keys() == whole.vector.tensors.keys()
    for name, tensor in whole.vector.tensors.items():
        assert torch.equal(resumed.vector.tensors[name], tensor)
    ledgers = [
        [{k: v for k, v in line.items() if k != "time"} for line in events(tmp_path / name, "trial")]
        for name in ("whole", "cut")
    ]
    assert ledgers[0] == ledgers[1]
    pages = [(tmp_path / name / "training.html").read_text() for name in ("whole", "cut")]
    assert pages[0] == pages[1]


def test_a_step_that_does_worse_on_some_documents_is_not_scored_on_all(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next is shorter; what no step improves stays as the line search left it."""
    outcomes = Trajectory.outcomes

    def spoilt(self: Trajectory, candidates: Any, documents: Any, tick: Any) -> list[list[Any]]:
        found = outcomes(self, candidates, documents, tick)
        return [
            [np.stack([-99 * right, right]) for _, right in own] if each.stage == "refine" else own
            for each, own in zip(candidates, found, strict=True)
        ]

    monkeypatch.setattr(Trajectory, "outcomes", spoilt)
    settings |= {"rungs": (Rung(1, 0.5, 1, 0.5),), "layers": "2"}
    result = train_vector(lm, "toy_choice", tmp_path / "out", **settings)
    steps = [line for line in events(tmp_path / "out", "trial") if line["stage"] == "refine"]
    assert [(line["candidate"].split("-")[-1], line["n"]) for line in steps] == [
        (str(factor), 12) for factor in ("1", "0.5", "0.25")
    ]
    assert result.sweep is not None
    assert result.sweep.finalist.stopped == "no step does better"
    assert result.sweep.finalist.chosen["refined"] == 0


def test_trials_that_are_not_finite_are_passed_over(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = Trajectory.outcomes

    def failing(self: Trajectory, candidates: Any, documents: Any, tick: Any) -> list[list[Any]]:
        found = outcomes(self, candidates, documents, tick)
        hit = [each.layer == 1 and each.stage != "baseline" for each in candidates]
        return [
            [float("nan") * one for one in own] if at_fault else own
            for at_fault, own in zip(hit, found, strict=True)
        ]

    monkeypatch.setattr(Trajectory, "outcomes", failing)
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(OnePass, "_line_search", interrupt)
        with pytest.raises(Stop):
            train_vector(lm, "toy_choice", folder, **settings)
    result = train_vector(lm, "toy_choice", folder, resume=True, **settings)
    assert result.sweep is not None
    assert {layer.layer for layer in result.sweep.layers} == {0, 2, 3}
    assert {line["layer"] for line in events(folder, "trial")} == {0, 2, 3}
    dropped = [line["candidate"] for line in events(folder, "dropped")]
    assert dropped
    assert len(dropped) == len(set(dropped))  # not scored again after the interruption
    assert all("layer1-" in name for name in dropped)
    settings["layers"] = "1"
    with pytest.raises(AFTError, match="No trial had a finite score"):
        train_vector(lm, "toy_choice", **settings)


def test_a_model_whose_baseline_is_not_finite_is_an_error(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path
) -> None:
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.fill_(torch.nan)
    for resume in (False, True):
        with pytest.raises(AFTError, match="gives NaN or infinite numbers"):
            train_vector(lm, "toy_choice", tmp_path / "out", resume=resume, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-2}, "has no setting 'lr'"),
        ({"epochs": 2}, "has no setting 'epochs'"),
        ({"lengths": []}, "no lengths to try"),
        ({"method": "drab"}, "does not fit the method 'drab'"),
        ({"screen": "order"}, "ranks the layers itself"),
        ({"protocol": "rapid", "refine": 3}, "has no setting 'refine'"),
        ({"protocol": "rapid", "positions": "auto"}, "cannot choose positions"),
    ],
)
def test_what_does_not_fit_is_an_error(
    changes: dict[str, Any], message: str, lm: AFTLM, settings: dict[str, Any]
) -> None:
    if changes.get("protocol"):
        settings.pop("refine")
    with pytest.raises(AFTError, match=message):
        train_vector(lm, "toy_choice", **(settings | changes))


@pytest.mark.slow
def test_two_processes_find_the_vector_of_one(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    """To the last bit in the search; refinement sums the processes' parts in another order."""
    arguments = [
        *("--model", checkpoint("llama"), "--task", "toy_choice", "--include-path", toy_tasks()),
        *("--protocol", "onepass", "--train-docs", "36", "--selection-docs", "24", "--seeds", "2"),
        *("--device", "cpu", "--refine"),
    ]
    by_one_and_by_two([*arguments, "0"], tmp_path / "search")
    lines = [
        sorted(json.dumps({k: v for k, v in line.items() if k != "time"}) for line in events(folder, "trial"))
        for folder in (tmp_path / "search" / "one", tmp_path / "search" / "two")
    ]
    assert lines[0] == lines[1]
    one, two = by_one_and_by_two([*arguments, "2"], tmp_path / "refined", exactly=False)
    for name, tensor in one.tensors.items():
        assert torch.allclose(two.tensors[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_vector_that_helps_is_found(tmp_path: Path) -> None:
    """On the embedded model: better than the line search alone, which is better than the best of the grid."""
    result = train_vector("demo", "aft_demo_choice", tmp_path / "out", protocol="onepass", progress=False)
    trials = events(tmp_path / "out", "trial")
    line, refined = (
        min(each["score"] for each in trials if each["stage"] == stage) for stage in ("line", "refine")
    )
    baseline = result.vector.metadata["selection"]["baseline"]["score"]
    assert baseline - line > 0.4
    assert line - refined > 0.2
    placebo = train_vector(
        "demo", "aft_demo_choice", protocol="onepass", control="random", layers="0", progress=False
    )
    assert placebo.vector.metadata["selection"]["vector"]["score"] > line + 0.1
