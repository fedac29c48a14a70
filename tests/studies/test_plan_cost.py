"""Costs planned from a config alone are those of the engine on a loaded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.studies.planner import (
    KNOWN,
    PlanCost,
    documents_of,
    find_config,
    plan_cost,
    typical_documents,
)
from lm_eval_aft.studies.simulated_device import (
    DEVICES,
    Device,
    Roofline,
    blocks_alike,
    meta_model,
    shallower,
)
from lm_eval_aft.training.candidate import Candidate, Recipe
from lm_eval_aft.training.cost import PeakMemory, Rates, Spent, flops_of
from lm_eval_aft.training.objectives import Choice
from lm_eval_aft.training.recipe import Protocol, Stage
from lm_eval_aft.training.trainer import Trajectory

WIDTH, DEPTH, INNER, VOCABULARY = 32, 8, 64, 500
LENGTHS = [(20, (3, 4, 5, 3)), (30, (6, 2, 4, 4))]
CPU = Device("a CPU", "cpu", 1e10, 1e10, 1e10, 1e-6)
ONCE = Protocol("once", train_docs=2, selection_docs=2, epochs=1, seeds=1)


def tiny() -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=INNER,
    )


def by_hand() -> int:
    """A step at every layer on each document, and judging each, in operations."""
    weights = 2 * WIDTH**2 + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * INNER
    total = 0
    for context, tails in LENGTHS:
        scored = 1 + sum(tail - 1 for tail in tails)
        tokens = context + scored - 1
        forward = 2 * weights * tokens + 4 * WIDTH * tokens**2
        backward = 2 * weights * tokens + 10 * WIDTH * tokens**2
        head = 2 * WIDTH * VOCABULARY
        total += 2 * (DEPTH * forward + head)  # the frozen pass, in training and in judging
        for above in range(DEPTH):
            total += 3 * scored * head + above * (2 * forward + backward)
    return total


def measured(budget: int) -> tuple[int, int]:
    """Operations and peak memory of the same on a loaded model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny()).float().eval()
    backbone = find_backbone(model)
    docs = [
        TokenizedDocument(tuple(((1,) * c, tuple(range(2, 2 + t))) for t in tails), (0,), (1.0,) * 4)
        for c, tails in LENGTHS
    ]
    engine = Trajectory(model, backbone, Choice("acc_norm"), packed=True, budget=budget)

    def run() -> None:
        every = [Intervention.static(layer, torch.zeros(WIDTH)) for layer in range(DEPTH)]
        group = [Candidate(layer, 0, Recipe(), each) for layer, each in enumerate(every)]
        engine.train(group, [[document] for document in docs], lambda _: None)
        engine.evaluate(group, docs, lambda _: None)

    with PeakMemory() as memory:
        run()
    return flops_of(run), memory.peak


def test_operations_are_exact_and_memory_is_near() -> None:
    documents = documents_of([*LENGTHS, LENGTHS[-1]])
    plan = plan_cost(tiny(), ONCE, documents, device=CPU, dtype=torch.float32, budget=1)
    flops, peak = measured(budget=1)
    assert plan.packed
    assert plan.steps == DEPTH * 2
    # Older versions of transformers form the rotary angles by a matrix product, 1 part in 20,000 here.
    assert flops == pytest.approx(by_hand(), rel=1e-4)
    assert plan.estimate.flops == pytest.approx(flops, rel=1e-4)
    assert plan.estimate.peak_bytes == pytest.approx(peak, rel=0.15)
    assert plan.total_bytes == plan.weight_bytes + plan.estimate.peak_bytes
    assert plan.fits
    ten = plan_cost(tiny(), Protocol("ten", **{**SIZES, "epochs": 10}), documents, device=CPU, budget=1)
    assert ten.estimate.flops == pytest.approx(10 * flops)
    assert ten.weight_bytes == pytest.approx(
        plan.weight_bytes / 2, rel=1e-2
    )  # bfloat16, but for rotary tables


@pytest.mark.parametrize("method", ["drab", "drab-strong", "mlp", "all-layers", "caa", "scale"])
def test_every_method_can_be_planned(method: str) -> None:
    documents = documents_of([*LENGTHS, LENGTHS[-1]])
    plans = [
        plan_cost(tiny(), ONCE, documents, device=CPU, dtype=torch.float32, budget=1, method=name)
        for name in ("static", method)
    ]
    static, other = plans
    assert other.scored == static.scored
    assert other.estimate.peak_bytes > 0
    if method == "caa":  # nothing is trained
        assert other.steps == 0
        assert 0 < other.estimate.flops < static.estimate.flops
    elif method == "all-layers":  # one candidate, where static has one for each layer
        assert other.steps * DEPTH == static.steps
    else:
        assert other.steps == static.steps
        assert other.estimate.flops >= static.estimate.flops


def test_known_operations_make_what_the_operations_themselves_make() -> None:
    a, b = torch.empty(3, 1, 4, device="meta"), torch.empty(5, 4, device="meta", dtype=torch.bfloat16)

    def work() -> list[torch.Tensor]:
        c = a + b
        whole = c.transpose(0, 1) * 2
        return [c, whole, whole.to(torch.float64), torch.cat([c, c]), *torch.max(c, dim=0), c.softmax(-1)]

    known: Any = {}
    with Roofline(CPU, known) as first:
        plain = work()
    assert known
    before = dict(known)
    with Roofline(CPU, known) as second:
        again = work()
    assert known == before
    assert second.spent == first.spent
    assert first.spent.seconds > 0
    for one, other in zip(plain, again, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert other.is_meta
        assert one is not other


def test_layers_with_a_window_are_like_others_where_it_cuts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=8, sliding_window=48,
    )  # fmt: skip
    model = meta_model(config, torch.float32)
    assert len(set(config.layer_types)) == 2
    assert [blocks_alike(model, tokens) for tokens in (None, 48, 49)] == [False, True, False]
    documents = documents_of([*LENGTHS, LENGTHS[-1]])

    def plan() -> PlanCost:
        return plan_cost(config, ONCE, documents, device=CPU, dtype=torch.float32, budget=1)

    shallow = plan()
    monkeypatch.setattr("lm_eval_aft.studies.planner.blocks_alike", lambda *_: False)
    whole = plan()  # every block is run
    assert shallow.estimate.flops == pytest.approx(whole.estimate.flops, rel=1e-3)
    assert shallow.estimate.seconds == pytest.approx(whole.estimate.seconds, rel=0.03)


SIZES: dict[str, Any] = {"train_docs": 2, "selection_docs": 2, "seeds": 1}


def test_stages_share_frozen_passes() -> None:
    one, ten = Spent(1.0, 10.0), Spent(2.0, 20.0)
    rates = Rates(one, ten, one, ten)
    search, final = Stage("search", 5, 3, 2, 4, 2), Stage("final", 6, 3, 2, 1, 1)
    assert rates.total([search], seeds=3).seconds == 4 * (3 * (1 + 5 * 2) + 2 * (1 + 5 * 2))
    assert rates.total([final], seeds=3).flops == 3 * (3 * 10 + 6 * 20) + 2 * (10 + 6 * 20)


def test_blocks_that_differ_are_all_run() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64
    )
    model: Any = meta_model(config, torch.float32)
    assert blocks_alike(model)
    model.model.layers[3].mlp.up_proj = torch.nn.Linear(32, 128, device="meta")
    assert not blocks_alike(model)
    assert len(find_backbone(meta_model(shallower(config, 3), torch.float32)).blocks) == 3


# Parameters in millions as the models' pages give them.
PUBLISHED = {
    "EleutherAI/pythia-160m": 162.3,
    "EleutherAI/pythia-410m": 405.3,
    "Qwen/Qwen1.5-0.5B": 464.0,
    "Qwen/Qwen1.5-1.8B": 1836.8,
    "Qwen/Qwen1.5-7B": 7721.3,
    "microsoft/phi-1_5": 1418.3,
    "stabilityai/stablelm-2-1_6b": 1644.5,
    "meta-llama/Llama-2-7b-hf": 6738.4,
    "mistralai/Mistral-7B-v0.1": 7241.7,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_known_models_have_their_published_size(name: str) -> None:
    model = meta_model(find_config(name), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.06)


@pytest.mark.slow
def test_a_7b_plan_fits_where_it_should() -> None:
    config, documents = find_config("meta-llama/Llama-2-7b-hf"), typical_documents("arc_challenge", 25)
    large = plan_cost(config, "rapid", documents, device=DEVICES["80gb"])
    assert large.fits
    assert large.weight_bytes == pytest.approx(2 * 6.7384e9, rel=1e-3)
    small = Device("8 GB", "cuda", 1e14, 1e12, 8e9, 1e-5)
    assert not plan_cost(config, "rapid", documents, device=small).fits


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(AFTError, match="cannot be had"):
        find_config("nobody/nothing")
    with pytest.raises(AFTError, match="Known: arc_challenge"):
        typical_documents("mmlu")
    assert all(len(shape) == 2 for shape in KNOWN.values())
