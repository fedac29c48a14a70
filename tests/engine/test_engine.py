"""The fast engine against the plain one: same numbers, same gradients, same vectors, any family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine import attention, checks
from lm_eval_aft.engine.batching import (
    TokenizedDocument,
    continuation_logits,
    make_batch,
    option_logprobs,
    token_budget_batches,
    token_logprobs,
)
from lm_eval_aft.engine.checks import packing_problem
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.training.candidate import Candidate, Engine, Recipe, in_steps
from lm_eval_aft.training.cost import PeakMemory, peak_memory
from lm_eval_aft.training.objectives import LM, Choice, Objective
from lm_eval_aft.training.setup import first_gradients, layer_order, rank_correlation
from lm_eval_aft.training.trainer import Reference, Trajectory, make_engine, master_dtype
from tests.conftest import FAMILIES, tiny_model

PACKED = {
    "gpt_neox",
    "llama",
    "qwen2",
    "qwen3",
    "phi",
    "stablelm",
    "mistral",
    "gpt2",
    "opt",
    "granite",
    "olmo2",
    "smollm3",
}
# Every way through the engine: packed, behind a window, ALiBi, masks of their own. The others follow the same
# ways, and test_support takes each of them through training against plain autograd.
OFTEN = ("gpt_neox", "llama", "gemma2", "bloom", "gpt_neo")
BY_TIER = [pytest.param(family, marks=[] if family in OFTEN else [pytest.mark.full]) for family in FAMILIES]
CPU = (torch.device("cpu"), torch.float32)


def documents(
    n: int = 6, seed: int = 0, options: Sequence[int] = (4, 2, 3), context: int = 9
) -> list[TokenizedDocument]:
    """Random documents of uneven sizes, some options one token long."""
    draw = np.random.default_rng(seed)

    def ids(k: int) -> tuple[int, ...]:
        return tuple(int(i) for i in draw.integers(5, 60, k))

    made = []
    for i in range(n):
        count = options[i % len(options)]
        shared = ids(int(draw.integers(2, context + 1)))
        tails = [ids(int(draw.integers(1, 6))) for _ in range(count)]
        lengths = tuple(float(draw.integers(1, 30)) for _ in range(count))
        made.append(
            TokenizedDocument(tuple((shared, tail) for tail in tails), (int(draw.integers(count)),), lengths)
        )
    return made


def single(n: int = 6) -> list[TokenizedDocument]:
    return [TokenizedDocument((document.pairs[0],)) for document in documents(n)]


def candidate(
    model: Any, layer: int, recipe: Recipe | None = None, seed: int = 0, scale: float = 0.1
) -> Candidate:
    backbone = find_backbone(model)
    zero = torch.zeros(backbone.hidden_size, dtype=master_dtype(model.dtype))
    made = Candidate(layer, seed, recipe or Recipe(), Intervention.static(layer, zero))
    with torch.no_grad():
        made.vector.add_(scale * torch.randn(32, generator=torch.Generator().manual_seed(layer)))
    return made


def nothing(_done: int) -> None:
    pass


def gradient(engine: Engine, model: Any, layer: int, docs: Sequence[TokenizedDocument]) -> torch.Tensor:
    """The gradient of the mean loss over ``docs``, read off just before the optimiser uses it."""
    probe = candidate(model, layer)
    seen: list[torch.Tensor] = []
    probe.step = lambda: seen.append(probe.vector.grad.clone())  # type: ignore[method-assign, union-attr]
    engine.train([probe], [docs], nothing)
    return seen[0]


@pytest.mark.parametrize(
    "objective", [Choice("acc"), Choice("acc_norm"), LM()], ids=lambda o: f"{o.name}-{o.metric}"
)
@pytest.mark.parametrize("family", BY_TIER)
def test_engine_equals_reference(family: str, objective: Objective) -> None:
    model = tiny_model(family)
    backbone = find_backbone(model)
    docs = single() if objective.name == "lm" else documents()
    engine, name = make_engine(model, backbone, objective, docs)
    if objective.name == "choice":
        assert name == ("packed" if family in PACKED else "unpacked")
    reference = Reference(model, backbone, objective)
    for layer in range(4):
        fast, slow = (gradient(e, model, layer, docs) for e in (engine, reference))
        assert float((fast - slow).norm() / slow.norm()) <= 1e-5
    probes = [candidate(model, layer) for layer in range(4)]
    for fast_score, slow_score in zip(
        engine.evaluate(probes, docs, nothing), reference.evaluate(probes, docs, nothing), strict=True
    ):
        assert fast_score.cross_entropy == pytest.approx(slow_score.cross_entropy, rel=1e-5)
        assert fast_score.score == pytest.approx(slow_score.score, rel=1e-4)
        assert fast_score.accuracy == slow_score.accuracy
    assert engine.baseline(docs, nothing).score == pytest.approx(
        reference.baseline(docs, nothing).score, rel=1e-4
    )


@pytest.mark.parametrize("family", sorted(PACKED))
def test_packed_log_likelihoods_equal_unpacked(family: str) -> None:
    model = tiny_model(family)
    docs = documents(9)
    assert packing_problem(model, docs) == ""
    scores = []
    for packed in (True, False):
        batch = make_batch(docs, packed, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            scores.append(option_logprobs(continuation_logits(model, batch), batch))
    assert float((scores[0] - scores[1]).abs().max()) <= 1e-4


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - PACKED))
def test_families_that_cannot_pack_say_why(family: str) -> None:
    assert packing_problem(tiny_model(family), documents(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_mask_would_be_noticed(dtype: torch.dtype) -> None:
    """The self-check fails for a model that ignores the tree mask."""
    model = tiny_model("llama", dtype=dtype)
    forward = model.model.forward
    model.model.forward = lambda *a, attention_mask=None, **k: forward(*a, **k)
    how = "differ by" if dtype == torch.float32 else "against float32"
    assert how in packing_problem(model, documents(9))


def test_16_bits_pack_where_they_err_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where packed and unpacked rows, each a draw of rounding, are further apart than the bar."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    monkeypatch.setattr(checks, "disagreement", lambda *_: "differ by 1 nats")
    assert packing_problem(model, documents(9)) == ""


def test_a_model_that_cannot_resume_falls_back_to_the_plain_engine() -> None:
    model = tiny_model("llama")
    embed = model.model.embed_tokens
    # Something outside the blocks that makes a resumed pass differ: it looks at whether block 0 ran.
    block = model.model.layers[0]
    ran = []
    original = block.mlp.forward
    block.mlp.forward = lambda x: (ran.append(1), original(x))[1]
    final = model.model.norm.forward
    model.model.norm.forward = lambda x: final(x) * (1.0 if ran else 2.0)
    embed.register_forward_hook(lambda *_: ran.clear())
    docs = documents()
    engine, name = make_engine(model, find_backbone(model), Choice("acc"), docs)
    assert name == "reference"
    assert isinstance(engine, Reference)


@pytest.mark.parametrize("family", BY_TIER)
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_same_vector_after_three_epochs(family: str, batch_size: int) -> None:
    model = tiny_model(family)
    backbone = find_backbone(model)
    docs = documents(8)
    recipe = Recipe(lr=1e-2, l2=1e-3, epochs=3)
    engine, _ = make_engine(model, backbone, Choice("acc_norm"), docs)
    vectors = []
    for each in (engine, Reference(model, backbone, Choice("acc_norm"))):
        ours = [candidate(model, layer, recipe, scale=0) for layer in range(4)]
        for _ in range(3):
            each.train(ours, list(in_steps(docs, batch_size)), nothing)
        vectors.append(torch.stack([c.vector.detach() for c in ours]))
    difference = (vectors[0] - vectors[1]).norm(dim=1) / vectors[1].norm(dim=1)
    assert float(difference.max()) <= 1e-5


def fp64(objective: Objective, budget: int = 4096, packed: bool = True) -> tuple[Any, Trajectory]:
    # Llama's RMSNorm computes in fp32 whatever the model's dtype; LayerNorm does not.
    model = tiny_model("gpt_neox", dtype=torch.float64)
    return model, Trajectory(model, find_backbone(model), objective, packed=packed, budget=budget)


@pytest.mark.parametrize(
    "objective", [Choice("acc"), Choice("acc_norm"), LM()], ids=lambda o: f"{o.name}-{o.metric}"
)
@pytest.mark.parametrize("layer", [0, 3])
def test_gradient_equals_finite_differences(objective: Objective, layer: int) -> None:
    model, engine = fp64(objective)
    docs = single(4) if objective.name == "lm" else documents(4)
    analytic = gradient(engine, model, layer, docs)
    probe = candidate(model, layer)
    step = 1e-6
    for index in range(0, 32, 5):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                probe.vector[index] += sign * step
                losses.append(engine.evaluate([probe], docs, nothing)[0].cross_entropy)
                probe.vector[index] -= sign * step
        numeric = (losses[0] - losses[1]) / (2 * step)
        assert numeric == pytest.approx(float(analytic[index]), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("objective", [Choice("acc_norm"), LM()], ids=["choice", "lm"])
def test_losses_do_not_depend_on_padding_batch_or_order(objective: Objective) -> None:
    docs = single(9) if objective.name == "lm" else documents(9)
    found = []
    for packed, budget, order in [
        (True, 4096, 1),
        (True, 1, 1),
        (False, 4096, 1),
        (False, 30, -1),
        (True, 64, -1),
    ]:
        model, engine = fp64(objective, budget, packed)
        score = engine.evaluate([candidate(model, 1)], docs[::order], nothing)[0]
        found.append((score.cross_entropy, score.score, score.accuracy))
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-6)


def test_gradients_gathered_over_small_passes_equal_one_big_pass() -> None:
    docs = documents(9)
    gradients = []
    for budget in (4096, 1):
        model, engine = fp64(Choice("acc_norm"), budget)
        gradients.append(gradient(engine, model, 2, docs))
    assert torch.allclose(*gradients, atol=1e-10)


def test_budget_is_kept_and_everything_is_served() -> None:
    docs = documents(20)
    for budget in (1, 50, 200):
        groups = list(token_budget_batches(docs, True, budget))
        assert [i for group in groups for i in group] == list(range(20))
        for group in groups:
            size = sum(docs[i].rows(True) for i in group) * max(docs[i].tokens(True) for i in group)
            assert len(group) == 1 or size <= budget


def test_options_with_contexts_of_their_own_get_rows_of_their_own() -> None:
    shared, other = documents(2, options=(2,))
    mixed = TokenizedDocument((shared.pairs[0], other.pairs[0], shared.pairs[1]), (1,), (3.0, 4.0, 5.0))
    assert (mixed.rows(True), mixed.rows(False)) == (2, 3)
    model = tiny_model("llama")
    for packed in (True, False):
        batch = make_batch([mixed], packed, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            scores = option_logprobs(continuation_logits(model, batch), batch)
        expected = []
        for context, tail in mixed.pairs:
            logits = model(torch.tensor([context + tail])).logits[0, len(context) - 1 : -1].log_softmax(-1)
            expected.append(float(logits[range(len(tail)), list(tail)].sum().detach()))
        assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_training_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine, _ = make_engine(model, find_backbone(model), Choice("acc"), documents())
    engine.train([candidate(model, 1)], [documents()], nothing)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in block.__dict__ and not block._forward_hooks for block in model.model.layers)


def test_nan_stops_a_candidate_and_no_other() -> None:
    model = tiny_model("llama")
    engine, _ = make_engine(model, find_backbone(model), Choice("acc"), documents())
    good, bad = candidate(model, 1), candidate(model, 2)
    with torch.no_grad():
        bad.vector[0] = float("nan")
    engine.train([good, bad], list(in_steps(documents(), 2)), nothing)
    assert bad.stopped == "gradient not finite"
    assert not good.stopped
    assert bool(torch.isfinite(good.vector).all())


class Scarce:
    """A model's memory, simulated: passes over more than so many tokens fail."""

    def __init__(self, model: Any, tokens: int, message: str) -> None:
        self.tokens, self.failures = tokens, 0
        forward = model.forward

        def limited(*args: Any, **kwargs: Any) -> Any:
            if kwargs["input_ids"].numel() > self.tokens:
                self.failures += 1
                raise RuntimeError(message)
            return forward(*args, **kwargs)

        model.forward = limited


ALLOCATOR = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to ..."


def test_out_of_memory_halves_the_budget_and_gives_the_same_result() -> None:
    docs = documents(12)
    recipe = Recipe(lr=1e-2)
    found = []
    for scarce in (False, True):
        model = tiny_model("llama")
        engine = Trajectory(model, find_backbone(model), Choice("acc"), packed=True, budget=4096)
        memory = Scarce(model, 60, ALLOCATOR) if scarce else None
        ours = [candidate(model, layer, recipe, scale=0) for layer in range(4)]
        engine.train(ours, list(in_steps(docs, 6)), nothing)
        scores = engine.evaluate(ours, docs, nothing)
        if memory:
            assert memory.failures >= 1
            assert engine.budget <= 60
        found.append((torch.stack([c.vector.detach() for c in ours]), [s.cross_entropy for s in scores]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_out_of_memory_on_one_document_says_what_to_do() -> None:
    model = tiny_model("llama")
    engine = Trajectory(model, find_backbone(model), Choice("acc"), packed=True)
    Scarce(model, 3, ALLOCATOR)
    with pytest.raises(AFTError, match="single document"):
        engine.train([candidate(model, 0)], [documents()], nothing)


def test_other_errors_are_not_taken_for_memory() -> None:
    model = tiny_model("llama")
    engine = Trajectory(model, find_backbone(model), Choice("acc"), packed=True)
    Scarce(model, 3, "something else broke")
    with pytest.raises(RuntimeError, match="something else"):
        engine.train([candidate(model, 0)], [documents()], nothing)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma2", "bloom"])
def test_screen_gives_every_layers_gradient_from_one_backward_pass(family: str) -> None:
    model = tiny_model(family)
    backbone, docs = find_backbone(model), documents()
    engine, _ = make_engine(model, backbone, Choice("acc_norm"), docs)
    assert isinstance(engine, Trajectory)
    found = first_gradients(engine, docs)
    reference = Reference(model, backbone, Choice("acc_norm"))
    for layer in range(4):
        probe = candidate(model, layer, scale=0)
        seen: list[torch.Tensor] = []
        probe.step = lambda probe=probe, seen=seen: seen.append(probe.vector.grad.clone())  # type: ignore[method-assign, misc]
        reference.train([probe], [docs], nothing)
        assert float((found[layer] - seen[0]).norm() / seen[0].norm()) <= 1e-5
    assert all("forward" not in block.__dict__ and not block._forward_hooks for block in backbone.blocks)


def test_screen_order_and_its_rank_correlation() -> None:
    gradients = {0: torch.tensor([1.0, -1.0]), 1: torch.tensor([3.0, 0.0]), 2: torch.tensor([0.1, 0.0])}
    assert layer_order(gradients, [0, 1, 2]) == [1, 0, 2]
    assert rank_correlation([1, 0, 2], {0: -0.2, 1: -0.3, 2: -0.1}) == pytest.approx(1)
    assert rank_correlation([1, 0, 2], {0: -0.2, 1: -0.1, 2: -0.3}) == pytest.approx(-1)
    assert rank_correlation([1, 0], {0: 0.0, 1: 1.0}) != rank_correlation([1, 0], {0: 0.0, 1: 1.0})  # NaN


def test_memory_estimate_counts_what_is_alive_at_once() -> None:
    with PeakMemory() as memory:
        kept = torch.empty(1000)
        for _ in range(3):
            torch.empty(5000)  # gone again at once
        view = kept[10:].add_(1)  # no memory of its own
        del kept, view
        torch.empty(2000)
    assert memory.peak == 4 * 6000
    assert memory.alive == 0


def test_bf16_selection_scores_stay_near_fp32() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("gpt_neox", dtype=dtype)
        engine, _ = make_engine(model, find_backbone(model), Choice("acc"), documents(12))
        ours = candidate(model, 1, Recipe(lr=1e-2), scale=0)
        engine.train([ours], list(in_steps(documents(12), 4)), nothing)
        assert ours.vector.dtype == torch.float32  # the master copy
        found.append(engine.evaluate([ours], documents(12), nothing)[0].cross_entropy)
    assert found[1] == pytest.approx(found[0], rel=0.05)


@pytest.mark.parametrize("family", sorted(PACKED))
def test_long_contexts_split_attention_and_stay_exact(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the causal part computed without a mask: the same log-likelihoods and gradients."""
    model = tiny_model(family)
    docs = documents(6, context=40)
    calls = []
    monkeypatch.setattr(attention, "WORTHWHILE", 2)
    original = attention._attention
    monkeypatch.setattr(attention, "_attention", lambda *a: (calls.append(1), original(*a))[1])
    engine = Trajectory(model, find_backbone(model), Choice("acc_norm"), packed=True)
    reference = Reference(model, find_backbone(model), Choice("acc_norm"))
    for layer in (0, 2):
        fast, slow = (gradient(e, model, layer, docs) for e in (engine, reference))
        assert float((fast - slow).norm() / slow.norm()) <= 1e-5
    batch = make_batch(docs, True, torch.device("cpu"), torch.float32)
    assert [part.prefix for part in batch.parts] == [len(d.pairs[0][0]) for d in docs]
    assert calls


def sharing(n: int = 7, seed: int = 3, tails: Sequence[int] = (3, 1, 4)) -> list[TokenizedDocument]:
    """Documents in groups of three (the last one alone) whose contexts begin alike, and one of no group."""
    draw = np.random.default_rng(seed)

    def ids(k: int) -> tuple[int, ...]:
        return tuple(int(i) for i in draw.integers(5, 60, k))

    made, prefix = [], ()
    for i in range(n):
        prefix = prefix if i % 3 else ids(40)
        context = prefix + ids(int(draw.integers(1, 9)))
        pairs = tuple((context, ids(k)) for k in tails)
        made.append(TokenizedDocument(pairs, (i % len(tails),), tuple(5.0 + k for k in tails), group=i // 3))
    return [*made, *documents(1)] if len(tails) > 1 else made


@pytest.mark.parametrize("tails", [(3, 1, 4), (6,)], ids=["options", "one continuation"])
@pytest.mark.parametrize("worthwhile", [2, 128], ids=["by branch", "under one mask"])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen2", "gpt2"])
def test_documents_that_share_a_row_keep_their_numbers(
    family: str, worthwhile: int, tails: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "WORTHWHILE", worthwhile)
    model, docs = tiny_model(family), sharing(tails=tails)
    backbone, objective = find_backbone(model), Choice("acc_norm") if len(tails) > 1 else LM()
    engine, name = make_engine(model, backbone, objective, docs)
    assert name == "packed"
    assert isinstance(engine, Trajectory)
    assert max(batch.inputs["input_ids"].shape[1] for batch in engine.batches(docs)) > 40 + 3 * 3
    reference = Reference(model, backbone, objective)
    for layer in (0, 2):
        fast, slow = (gradient(e, model, layer, docs) for e in (engine, reference))
        assert float((fast - slow).norm() / slow.norm()) <= 1e-5
    probes = [candidate(model, layer) for layer in range(4)]
    fast_scores, slow_scores = (e.evaluate(probes, docs, nothing) for e in (engine, reference))
    for ours, theirs in zip(fast_scores, slow_scores, strict=True):
        assert ours.cross_entropy == pytest.approx(theirs.cross_entropy, rel=1e-5)
        assert ours.accuracy == theirs.accuracy


def test_steps_and_batches_keep_groups_together_and_lose_nobody() -> None:
    docs = sharing(10)
    shuffled = [docs[i] for i in np.random.default_rng(0).permutation(len(docs))]
    steps = list(in_steps(shuffled, 1))
    assert sorted(len(step) for step in steps) == [1, 1, 3, 3, 3]
    assert sorted(map(hash, shuffled)) == sorted(hash(d) for step in steps for d in step)
    for budget in (1, 30, 4096):
        batches = list(token_budget_batches(shuffled, True, budget))
        assert sorted(i for batch in batches for i in batch) == list(range(len(docs)))
    assert len(batches) == 1
    # A row that would outgrow what a budget allows is cut, down to single documents.
    assert max(len(batch) for batch in token_budget_batches(shuffled, True, 1)) == 1


def test_contexts_that_are_not_alike_share_nothing() -> None:
    """Same group, but the prompts were cut on the left in different places."""
    docs = [
        TokenizedDocument(((d.pairs[0][0][i:], d.pairs[0][1]),), group=0)
        for i, d in enumerate(sharing(3)[:3])
    ]
    batch = make_batch(docs, True, *CPU)
    assert batch.inputs["input_ids"].shape[0] == 3


def test_options_that_are_ruled_out_leave_no_subnormal_gradients() -> None:
    """Products with subnormal numbers take many times as long; what they stand for adds nothing."""
    batch = make_batch([TokenizedDocument((((1, 2), (3, 4)), ((1, 2), (5, 6))))], True, *CPU)
    logits = torch.randn(len(batch.scored), 64, requires_grad=True)
    tokens = token_logprobs(logits, batch)
    weights = torch.tensor([1.0, 1.0, 1e-36, 1e-36])  # an option 83 nats behind
    (tokens * weights).sum().backward()
    assert logits.grad is not None
    nonzero = logits.grad[logits.grad != 0].abs()
    assert float(nonzero.min()) > torch.finfo(torch.float32).tiny
    plain = logits.detach().double().requires_grad_()
    (plain.log_softmax(-1)[batch.source, batch.targets] * weights.double()).sum().backward()
    assert plain.grad is not None
    expected = plain.grad.float()
    assert float((logits.grad - expected).norm() / expected.norm()) < 1e-6


def test_peak_memory_sees_what_a_block_allocates() -> None:
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(32 * 2**20 // 4).add_(1)  # 32 MiB, gone at the end
    assert 30 * 2**20 <= peak() <= 40 * 2**20
