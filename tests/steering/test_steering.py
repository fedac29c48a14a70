"""Applying a vector: exactly an addition at a block's output, and gone when removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lm_eval_aft import AFTError, SteeringVector, attach
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.fingerprint import fingerprint
from lm_eval_aft.steering.hooks import add_at
from tests.conftest import FAMILIES, tiny_model, tiny_tokenizer

IDS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def block_inputs(model: torch.nn.Module) -> list[torch.Tensor]:
    """What each block is given, and last what the final norm is: seen by hooks of the test's own."""
    blocks = find_backbone(model).blocks
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_and_outputs_shifted(family: str) -> None:
    model = tiny_model(family)
    backbone = find_backbone(model)
    assert len(backbone.blocks) == 4
    assert backbone.hidden_size == 32
    before = block_inputs(model)
    vector = SteeringVector({1: torch.randn(32)})
    with attach(model, vector):
        steered = block_inputs(model)
    after = block_inputs(model)
    assert torch.equal(steered[1], before[1])
    assert torch.equal(steered[2], before[2] + vector.layers[1])
    assert not torch.allclose(steered[3], before[3] + vector.layers[1])
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_naive_hook_gives_the_same_logits() -> None:
    model = tiny_model("qwen2")
    v, w = torch.randn(32), torch.randn(32)
    handles = [
        block.register_forward_hook(lambda _m, _i, out, add=add: out + add)
        for block, add in zip((model.model.layers[0], model.model.layers[2]), (0.5 * v, 0.5 * w), strict=True)
    ]
    expected = model(IDS).logits
    for handle in handles:
        handle.remove()
    handle = attach(model, SteeringVector({0: v, 2: w}), coefficient=0.5)
    assert torch.equal(model(IDS).logits, expected)
    handle.remove()
    handle.remove()
    assert not torch.equal(model(IDS).logits, expected)


def test_generation_steers_every_decode_step() -> None:
    model = tiny_model("llama")
    vector = SteeringVector({2: 3 * torch.randn(32)})
    generate: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    with attach(model, vector):
        cached = model.generate(IDS, **generate)
        plain = model.generate(IDS, use_cache=False, **generate)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, model.generate(IDS, **generate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_product_is_formed_in_fp32_then_cast(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    vector = SteeringVector({0: torch.randn(32)}, coefficient=0.3)
    before = block_inputs(model)[1]
    with attach(model, vector):
        after = block_inputs(model)[1]
    assert torch.equal(after, before + (vector.layers[0] * 0.3).to(dtype))


def test_coefficient_zero_sets_no_hook() -> None:
    model = tiny_model("llama")
    with attach(model, SteeringVector({0: torch.randn(32)}), coefficient=0):
        assert not find_backbone(model).blocks[0]._forward_hooks


def test_a_model_moved_under_a_vector_keeps_being_steered() -> None:
    model = tiny_model("llama")
    vector = SteeringVector({0: torch.randn(32)})
    with attach(model, vector):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            model.to(dtype)
            steered = block_inputs(model)[1]
            assert steered.dtype == dtype
    assert torch.equal(steered, block_inputs(model)[1] + vector.layers[0])


def test_gradients_reach_the_vector_in_the_dtype_it_has() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).requires_grad_(False)
    before = block_inputs(model)[2]
    vector = torch.randn(32, requires_grad=True)
    handle = add_at(find_backbone(model).blocks[1], vector)
    after = block_inputs(model)[2]
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, before + vector.to(torch.bfloat16))
    model(IDS).logits.float().square().sum().backward()
    handle.remove()
    assert vector.grad is not None
    assert vector.grad.dtype == torch.float32
    assert vector.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("learns", [False, True, None])
def test_what_else_a_block_returns_stays(kind: type, learns: bool | None) -> None:
    block = torch.nn.Identity()
    shift = (lambda hidden: hidden + 1) if learns is None else torch.ones(32).requires_grad_(learns)
    handle = add_at(block, shift)
    output = block(kind([torch.zeros(2, 3, 32), "second", "third"]))
    handle.remove()
    assert type(output) is kind
    assert output[1:] == kind(["second", "third"])
    assert torch.equal(output[0], torch.ones(2, 3, 32))


def test_a_block_without_hidden_states_is_refused() -> None:
    block = torch.nn.Identity()
    add_at(block, torch.ones(32))
    with pytest.raises(AFTError, match="returned dict, not a tensor of hidden states"):
        block({"hidden": torch.zeros(2, 3, 32)})


@pytest.mark.parametrize("learns", [False, True])
def test_the_vector_follows_the_hidden_states_to_their_device(learns: bool) -> None:
    block = torch.nn.Identity()
    add_at(block, torch.ones(32).requires_grad_(learns))
    # A tensor without data refuses to meet one of the CPU, as a GPU's does.
    assert block(torch.zeros(2, 3, 32, device="meta")).device.type == "meta"


def test_a_vector_for_every_position_does_not_watch_the_model() -> None:
    model = tiny_model("llama")
    with attach(model, SteeringVector({0: torch.ones(32)})):
        assert not model._forward_pre_hooks
    with attach(model, SteeringVector({0: torch.ones(32)}, positions="last")):
        assert model._forward_pre_hooks


def test_another_vocabulary_is_refused_where_the_tokenizer_is_given() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    vector = SteeringVector({0: torch.ones(32)}, metadata={"fingerprint": fingerprint(model, tokenizer)})
    tokenizer.add_tokens(["hippopotamus"])
    attach(model, vector).remove()
    with pytest.raises(AFTError, match="tokenizer vocabulary"):
        attach(model, vector, tokenizer=tokenizer)


@pytest.mark.parametrize("padded", [False, True])
def test_positions_are_told_from_the_models_own_inputs(padded: bool) -> None:
    model = tiny_model("llama")
    vector = SteeringVector({1: torch.randn(32)}, positions="last")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0 if padded else 1
    mask[1, 8:] = 0 if padded else 1
    last = [11, 7 if padded else 11]
    found: list[torch.Tensor] = []
    block = find_backbone(model).blocks[2]
    watch = block.register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    with torch.no_grad():
        model(IDS, attention_mask=mask)
        handle = attach(model, vector, coefficient=2.0)
        model(IDS, attention_mask=mask)
        handle.remove()
        model(IDS, attention_mask=mask)
    watch.remove()
    before, steered, after = found
    assert torch.equal(before, after)
    assert not model._forward_pre_hooks
    expected = before.clone()
    for row, token in enumerate(last):
        expected[row, token] += 2 * vector.layers[1]
    assert torch.equal(steered, expected)


def test_peft_wrapped_model() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    vector = SteeringVector({1: torch.randn(32)})
    with attach(model, vector):
        expected = model(IDS).logits
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    with attach(wrapped, vector):
        assert torch.allclose(wrapped(input_ids=IDS).logits, expected, atol=1e-5)


def test_refusals() -> None:
    model = tiny_model("llama")
    with pytest.raises(AFTError, match=r"hidden size 16, the model 32.\s+A vector only fits the model"):
        attach(model, SteeringVector({0: torch.ones(16)}))
    with pytest.raises(AFTError, match="Layer 9 is out of range: this model has blocks 0 to 3"):
        attach(model, SteeringVector({9: torch.ones(32)}))
    with pytest.raises(AFTError, match="has no module 'model.nothing'"):
        attach(model, SteeringVector({0: torch.ones(32)}), blocks="model.nothing")
    assert not any(block._forward_hooks for block in find_backbone(model).blocks)


def test_unknown_structure_says_how_to_name_the_blocks() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = tiny_model("llama").config
            self.left = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))
            self.right = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))

    with pytest.raises(AFTError, match='blocks="path.to.layers"'):
        find_backbone(Odd())
    assert find_backbone(Odd(), "left").name == "left"


def test_encoder_decoder_is_refused() -> None:
    import transformers

    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    with pytest.raises(AFTError, match="Encoder-decoder"):
        find_backbone(transformers.T5ForConditionalGeneration(config))
