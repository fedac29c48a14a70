"""Layout of packed rows token by token, the head on chosen positions, and passes that start at a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_eval_aft.engine.attention import Parts
from lm_eval_aft.engine.batching import (
    Batch,
    TokenizedDocument,
    capture,
    continuation_logits,
    logits_at,
    make_batch,
    option_logprobs,
    resumed,
    token_logprobs,
)
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.intervention import CONTEXT, GENERATED, LAST, PADDING
from tests.conftest import tiny_model

CPU = torch.device("cpu")
THREE = TokenizedDocument(
    (((5, 6, 7), (8, 9, 10)), ((5, 6, 7), (11,)), ((5, 6, 7), (12, 13))), (0,), (1.0, 2.0, 3.0)
)
ONE = TokenizedDocument((((20,), (21, 22)),))
# Two documents with 40 shared tokens, then contexts and options of their own.
SHARED = tuple(range(100, 140))
ALIKE = [
    TokenizedDocument((((*SHARED, 1, 2), (3, 4)), ((*SHARED, 1, 2), (5, 6, 7))), group=7),
    TokenizedDocument((((*SHARED, 8), (9,)), ((*SHARED, 8), (10, 11))), group=7),
]


def visible(batch: Batch, row: int) -> list[list[int]]:
    """Which positions each token of a row sees."""
    mask = batch.inputs["attention_mask"][row, 0]
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(mask.dtype).min}
    return [torch.nonzero(line == 0)[:, 0].tolist() for line in mask]


def test_a_packed_row_token_by_token() -> None:
    batch = make_batch([THREE, ONE], True, CPU, torch.float32)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 12], [20, 21, 0, 0, 0, 0]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 0, 0, 0, 0]]
    assert visible(batch, 0) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5]]
    assert visible(batch, 1) == [[0], [0, 1], [2], [3], [4], [5]]  # padding sees itself only
    assert batch.roles.tolist() == [
        [CONTEXT, CONTEXT, LAST, GENERATED, GENERATED, GENERATED],
        [LAST, GENERATED, PADDING, PADDING, PADDING, PADDING],
    ]
    # The context's last token predicts the first token of all three options, and is scored once.
    assert batch.scored.tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.targets.tolist() == [8, 9, 10, 11, 12, 13, 21, 22]
    assert batch.source.tolist() == [0, 1, 2, 0, 0, 3, 4, 5]
    assert batch.option.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert batch.document.tolist() == [0, 0, 0, 1]
    assert batch.documents == (THREE, ONE)
    assert batch.parts == (Parts(3, ((3, 6),)), Parts(1, ((1, 2),)))


def test_rows_that_are_not_packed() -> None:
    batch = make_batch([THREE, ONE], False, CPU, torch.float32)
    assert set(batch.inputs) == {"input_ids"}
    assert batch.inputs["input_ids"].tolist() == [
        [5, 6, 7, 8, 9],
        [5, 6, 7, 0, 0],
        [5, 6, 7, 12, 0],
        [20, 21, 0, 0, 0],
    ]
    assert batch.scored.tolist() == [2, 3, 4, 7, 12, 13, 15, 16]
    assert batch.source.tolist() == list(range(8))
    assert batch.targets.tolist() == [8, 9, 10, 11, 12, 13, 21, 22]
    assert batch.option.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert batch.roles[1].tolist() == [CONTEXT, CONTEXT, LAST, PADDING, PADDING]
    assert batch.parts == ()


def test_a_row_that_documents_share() -> None:
    batch = make_batch(ALIKE, True, CPU, torch.float32)
    ids, places = batch.inputs["input_ids"], batch.inputs["position_ids"]
    assert ids.tolist() == [[*SHARED, 1, 2, 3, 5, 6, 8, 10]]
    assert places.tolist() == [[*range(40), 40, 41, 42, 42, 43, 40, 41]]
    seen = visible(batch, 0)
    prefix = list(range(40))
    assert seen[:40] == [list(range(i + 1)) for i in range(40)]
    assert seen[40] == [*prefix, 40]
    assert seen[42] == [*prefix, 40, 41, 42]  # the first option
    assert seen[44] == [*prefix, 40, 41, 43, 44]  # the second one does not see the first
    assert seen[45] == [*prefix, 45]  # the second document sees nothing of the first
    assert seen[46] == [*prefix, 45, 46]
    kinds = batch.roles[0].tolist()
    assert kinds[38:] == [CONTEXT, CONTEXT, CONTEXT, LAST, GENERATED, GENERATED, GENERATED, LAST, GENERATED]
    assert batch.scored.tolist() == [41, 42, 43, 44, 45, 46]
    assert batch.source.tolist() == [0, 1, 0, 2, 3, 4, 4, 5]
    assert batch.parts == (Parts(40, ((40, 45), (45, 47))),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_has_the_models_dtype(dtype: torch.dtype) -> None:
    mask = make_batch([THREE], True, CPU, dtype).inputs["attention_mask"]
    assert mask.dtype == dtype
    assert mask.shape == (1, 1, 6, 6)
    assert float(mask.min()) == torch.finfo(dtype).min


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_lies_on_the_device_asked_for(packed: bool) -> None:
    batch = make_batch([THREE, ONE], packed, torch.device("meta"), torch.float32)
    tensors = [*batch.inputs.values(), batch.scored, batch.targets, batch.source, batch.option]
    assert {tensor.device.type for tensor in (*tensors, batch.document, batch.roles)} == {"meta"}


def test_a_pass_and_its_log_likelihoods_stay_on_the_models_device() -> None:
    # Tensors without data, on the device "meta", refuse to meet the CPU's, as those of a GPU do.
    model = tiny_model("llama").to("meta")
    batch = make_batch(ALIKE, True, torch.device("meta"), torch.float32)
    found = option_logprobs(continuation_logits(model, batch), batch)
    assert found.device.type == "meta"
    assert found.shape == (4,)
    found.sum().backward()


def by_hand(model: nn.Module, documents: list[TokenizedDocument]) -> list[float]:
    """Each option's log-likelihood from a plain pass of its own."""
    found = []
    for document in documents:
        for context, tail in document.pairs:
            logits = model(torch.tensor([[*context, *tail]])).logits[0].log_softmax(-1)
            found.append(float(sum(logits[len(context) - 1 + i, token] for i, token in enumerate(tail))))
    return found


@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_log_likelihoods_equal_plain_passes(packed: bool) -> None:
    model = tiny_model("llama")
    documents = [THREE, ONE]
    batch = make_batch(documents, packed, CPU, torch.float32)
    found = option_logprobs(continuation_logits(model, batch), batch)
    assert found.tolist() == pytest.approx(by_hand(model, documents), abs=1e-5)


class Recorder(nn.Module):
    """Counts the positions that reach a model's head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.seen = head, [0]

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden.shape[:-1].numel())
        logits: Tensor = self.head(hidden)
        return logits


@pytest.fixture
def recorded() -> Iterator[tuple[Any, Recorder]]:
    model = tiny_model("llama")
    head = Recorder(model.lm_head)
    model.set_output_embeddings(head)
    yield model, head
    assert not head._forward_pre_hooks  # nothing of ours is left


@torch.no_grad()
def test_the_head_sees_the_scored_positions_only(recorded: tuple[Any, Recorder]) -> None:
    model, head = recorded
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    whole = model(**inputs).logits.reshape(6, -1)
    positions = torch.tensor([4, 0])
    assert torch.allclose(logits_at(model, inputs, positions), whole[positions], atol=1e-6)
    assert head.seen[-1] == 2
    with pytest.raises(ValueError, match="input_ids"):
        logits_at(model, {"nonsense": 1}, positions)
    # The check that the head obeyed must not be fooled by as many positions as there are tokens.
    every = torch.tensor([5, 4, 3, 2, 1, 0])
    assert torch.allclose(logits_at(model, inputs, every), whole[every], atol=1e-6)


@torch.no_grad()
def test_a_head_that_cannot_be_found_is_read_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    expected = model(**inputs).logits.reshape(6, -1)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda _self: None)
    for positions in (torch.tensor([4, 0]), torch.tensor([1])):
        assert torch.equal(logits_at(model, inputs, positions), expected[positions])
    one = {"input_ids": torch.tensor([[5, 6, 7]])}
    order = torch.tensor([2, 1, 0])  # as many as there are tokens: still to be picked
    assert torch.equal(logits_at(model, one, order), model(**one).logits[0][order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_token_logprobs_and_their_gradient(dtype: torch.dtype) -> None:
    batch = make_batch([THREE, ONE], True, CPU, dtype)
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(len(batch.scored), 64, generator=draw, dtype=torch.float64).to(dtype)
    ours, autograd = logits.clone().requires_grad_(True), logits.clone().requires_grad_(True)
    wide = torch.promote_types(dtype, torch.float32)
    found = token_logprobs(ours, batch)
    expected = autograd.to(wide).log_softmax(-1)[batch.source, batch.targets]
    assert found.dtype == wide
    assert torch.equal(found, expected)
    weights = torch.randn(len(found), generator=draw, dtype=wide)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert autograd.grad is not None
    assert ours.grad.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
    assert torch.allclose(ours.grad, autograd.grad, atol=tolerance, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_too_small_to_matter_are_dropped_and_no_others(scale: float) -> None:
    """Too small is meant relative to the largest one."""
    batch = make_batch([ONE], True, CPU, torch.float32)
    logits = torch.zeros(2, 64, requires_grad=True)
    (token_logprobs(logits, batch) * torch.tensor([scale, 1e-13 * scale])).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().max() > 0.5 * scale
    assert logits.grad[1].abs().max() == 0
    logits.grad = None
    (token_logprobs(logits, batch) * torch.tensor([scale, 1e-11 * scale])).sum().backward()
    assert float(logits.grad[1].abs().max()) == pytest.approx(1e-11 * scale, rel=0.05)


def test_option_logprobs_sum_each_options_tokens() -> None:
    batch = make_batch([THREE, ONE], True, CPU, torch.float32)
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(len(batch.scored), 64, generator=draw, dtype=torch.float64)
    each = token_logprobs(logits, batch)
    wanted = [each[:3].sum(), each[3], each[4:6].sum(), each[6:].sum()]
    found = option_logprobs(logits, batch)
    assert found.dtype == torch.float64
    assert torch.allclose(found, torch.stack(wanted), atol=1e-14)


@torch.no_grad()
def test_captured_outputs_are_those_of_the_blocks_asked_for() -> None:
    model = tiny_model("llama")
    backbone = find_backbone(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = model(ids, output_hidden_states=True).hidden_states
    before = [len(block._forward_hooks) for block in backbone.blocks]
    with capture(backbone, [0, 2]) as outputs:
        model(ids)
    assert [len(block._forward_hooks) for block in backbone.blocks] == before
    assert sorted(outputs) == [0, 2]
    for layer, output in outputs.items():
        assert torch.equal(output, hidden[layer + 1])
        assert not output.requires_grad


def test_captured_outputs_carry_no_graph() -> None:
    model = tiny_model("llama")
    with capture(find_backbone(model), [1]) as outputs:
        logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.requires_grad
    assert not outputs[1].requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("layer", [0, 2, 3])
@torch.no_grad()
def test_a_resumed_pass_runs_the_blocks_above_only(family: str, layer: int) -> None:
    model = tiny_model(family)
    backbone = find_backbone(model)
    batch = make_batch([THREE, ONE], True, CPU, torch.float32)
    whole = continuation_logits(model, batch)
    with capture(backbone, [layer]) as outputs:
        continuation_logits(model, batch)
    ran: list[int] = []
    handles = [
        # Attention is what a block that only passes on does not run.
        next(part for name, part in block.named_modules() if name.endswith(("attn", "attention")))
        .register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(backbone.blocks)
    ]  # fmt: skip
    seen: list[bool] = []
    handles.append(backbone.blocks[layer].register_forward_hook(lambda *_: seen.append(True)))
    forwards = [block.forward for block in backbone.blocks]
    with resumed(backbone, layer, outputs[layer]):
        again = continuation_logits(model, batch)
    assert torch.equal(again, whole)
    assert ran == list(range(layer + 1, 4))
    assert seen == [True]  # what steers there still does
    assert [block.forward for block in backbone.blocks] == forwards
    assert not any("forward" in vars(block) for block in backbone.blocks)
    for handle in handles:
        handle.remove()


def test_forwards_that_others_replaced_come_back() -> None:
    model = tiny_model("llama")
    backbone = find_backbone(model)
    original = backbone.blocks[0].forward

    def others(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    backbone.blocks[0].forward = others
    with capture(backbone, [1]) as outputs:
        model(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ZeroDivisionError), resumed(backbone, 1, outputs[1]):
        raise ZeroDivisionError
    assert backbone.blocks[0].forward is others
    assert "forward" not in vars(backbone.blocks[1])


@torch.no_grad()
def test_steering_by_position_sees_the_roles_of_packed_rows() -> None:
    from lm_eval_aft import SteeringVector, attach

    model = tiny_model("llama")
    batch = make_batch([THREE], True, CPU, torch.float32)
    plain = continuation_logits(model, batch)
    with attach(model, SteeringVector({3: torch.ones(32)}, positions="last")):
        steered = continuation_logits(model, batch)
    changed = (steered != plain).any(-1).tolist()
    assert changed == [True, False, False, False]  # at the last block only the token itself changes
    silent = replace(batch, roles=torch.full_like(batch.roles, GENERATED))
    with attach(model, SteeringVector({3: torch.ones(32)}, positions="last")):
        assert torch.equal(continuation_logits(model, silent), plain)
