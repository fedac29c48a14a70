"""Generation steered at some positions only, against a loop that reads everything anew for each token."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance

from lm_eval_aft import AFTError, SteeringVector, attach
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import cache_argument, find_backbone
from lm_eval_aft.steering.intervention import GENERATED, POSITIONS, RoleTracker, generating_from, prompt_roles
from lm_eval_aft.steering.methods import METHODS, find_method
from tests.support.families import tiny_model, tiny_tokenizer

# Two of them in the default tier, one with a sliding window; the rest takes a minute.
FAMILIES = [
    "llama",
    "gemma3_text",
    *(
        pytest.param(family, marks=pytest.mark.slow)
        for family in ("gpt2", "gpt_neox", "qwen2", "mistral-window", "falcon", "falcon-rope")
    ),
]
NEW = 8
PROMPTS = [[5, 9, 12], [7], [20, 6, 31, 11, 8, 8, 40]]
WIDTH = max(map(len, PROMPTS))
IDS = torch.tensor([[1] * (WIDTH - len(prompt)) + prompt for prompt in PROMPTS])
MASK = torch.tensor([[0] * (WIDTH - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
SOME = [positions for positions in POSITIONS if positions != "all"]


def vector_for(name: str, positions: str, layers: tuple[int, ...] = (1,)) -> SteeringVector:
    generator = torch.Generator().manual_seed(7)
    tensors = find_method(name).initial_tensors(32, layers, generator)
    tensors = {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}
    return SteeringVector.from_tensors(tensors, method=name, positions=positions, coefficient=4.0)


@contextmanager
def oracle(model: Any, vector: SteeringVector, pads: list[int], width: int) -> Iterator[None]:
    """Steer passes that read whole rows: which tokens, by counting columns alone.

    ``pads`` says how many columns each prompt is padded by on the left, ``width`` how many it has with them.
    """
    method = METHODS[vector.method]

    def hook(layer: int) -> Callable[..., Any]:
        def add(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            rows, columns = hidden.shape[:2]
            assert columns >= width, "the oracle is for passes without a cache"
            marks = torch.zeros(rows, columns, 1, dtype=torch.bool)
            for row in range(rows):
                pad = pads[row // (rows // len(pads))]
                first, end = {
                    "all": (0, columns),
                    "prompt": (pad, width),
                    "last": (width - 1, width),
                    "generated": (width, columns),
                }[vector.positions]
                marks[row, first:end] = True
            delta = vector.coefficient * method.delta(vector.tensors, layer, hidden)
            changed = torch.where(marks, hidden + delta, hidden)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return add

    blocks = find_backbone(model).blocks
    handles = [blocks[layer].register_forward_hook(hook(layer)) for layer in vector.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expected(model: Any, vector: SteeringVector, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    with oracle(model, vector, [WIDTH - len(prompt) for prompt in PROMPTS], WIDTH):
        return generate(model, use_cache=False, **kwargs)


def generate(model: Any, **kwargs: Any) -> torch.Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1, "attention_mask": MASK}
    found: torch.Tensor = model.generate(input_ids=IDS, **{**settings, **kwargs})
    return found


def steered(model: Any, vector: SteeringVector, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    with attach(model, vector):
        return generate(model, **kwargs)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 0.7},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 3},
}


def reference(way: str) -> dict[str, Any]:
    """The settings that decide the text; how keys and values are kept must not."""
    return {
        k: v
        for k, v in WAYS[way].items()
        if k not in ("cache_implementation", "prefill_chunk_size", "use_cache")
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_under_attach_equals_passes_without_a_cache(family: str, way: str) -> None:
    model = tiny_model(family)
    plain = generate(model, **reference(way))
    if (family, way) == ("falcon", "static"):
        with pytest.raises(ValueError, match="too many values"):
            generate(model, **WAYS[way])
        pytest.skip("transformers' ALiBi takes no static cache, steered or not")
    differ = 0
    for name in ("static", "drab"):
        for positions in POSITIONS:
            vector = vector_for(name, positions)
            wanted = expected(model, vector, **reference(way))
            found = steered(model, vector, **WAYS[way])
            assert torch.equal(found, wanted), (name, positions)
            differ += not torch.equal(wanted, plain)
    assert differ >= 4, "the vectors of this test change nothing"
    assert "generate" not in model.__dict__


@pytest.mark.parametrize("name", ["static", "drab"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_aftlm_generates_what_a_naive_loop_does(family: str, positions: str, name: str) -> None:
    vector = vector_for(name, positions)
    texts = ["the cat sees", "one", "a small fish likes the red tree"]
    kwargs = {"until": ["zzz"], "max_gen_toks": NEW, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, kwargs), i) for i, text in enumerate(texts)]
    answers = []
    for fast in (True, False):
        lm = AFTLM(tiny_model(family), tokenizer=tiny_tokenizer(), vector=vector, batch_size=3, fast=fast)
        answers.append(lm.generate_until(requests, disable_tqdm=True))
    lm = AFTLM(tiny_model(family), tokenizer=tiny_tokenizer())
    for i, text in enumerate(texts):
        start = lm.tok_encode(text)
        ids = list(start)
        with oracle(lm.model, vector, [0], len(start)), torch.no_grad():
            for _ in range(NEW):
                ids.append(int(lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
                if ids[-1] == lm.eot_token_id:
                    break
        wanted = lm.tok_decode([token for token in ids[len(start) :] if token != lm.eot_token_id])
        assert answers[0][i] == answers[1][i] == wanted


@pytest.mark.parametrize("positions", SOME)
def test_assisted_decoding_steers_the_same_tokens(positions: str) -> None:
    """Its first pass reads the prompt and the draft's tokens at once."""
    model, draft = tiny_model("llama"), tiny_model("llama", seed=1)
    vector = vector_for("static", positions)
    one = {
        "input_ids": IDS[2:],
        "attention_mask": MASK[2:],
        "max_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 1,
    }
    with oracle(model, vector, [0], WIDTH):
        wanted = model.generate(**one, use_cache=False)
    for how in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": model}):
        with attach(model, vector):
            assert torch.equal(model.generate(**one, **how), wanted), list(how)


@pytest.mark.parametrize("positions", SOME)
def test_embeddings_and_inferred_padding(positions: str) -> None:
    model, vector = tiny_model("llama"), vector_for("static", positions)
    wanted = expected(model, vector)
    with attach(model, vector):
        found = model.generate(input_ids=IDS, max_new_tokens=NEW, do_sample=False, pad_token_id=1)
        assert torch.equal(found, wanted)
        embeds = model.get_input_embeddings()(IDS)
        found = model.generate(
            inputs_embeds=embeds, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, pad_token_id=1
        )
    assert torch.equal(found, wanted[:, WIDTH:])


@pytest.mark.parametrize("positions", SOME)
def test_a_generation_goes_on_from_a_filled_cache(positions: str) -> None:
    model, vector = tiny_model("llama"), vector_for("static", positions)
    wanted = expected(model, vector)
    with attach(model, vector), torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        with generating_from(IDS, MASK):
            model(IDS[:, :4], attention_mask=MASK[:, :4], **{cache_argument(model): cache}, use_cache=True)
        found = generate(model, **{cache_argument(model): cache})
        assert torch.equal(found, wanted)
        cache = transformers.DynamicCache(config=model.config)
        with generating_from(IDS, MASK):
            model(IDS[:, :4], attention_mask=MASK[:, :4], **{cache_argument(model): cache}, use_cache=True)
        with pytest.raises(AFTError, match="needs a mask"):
            generate(model, attention_mask=None, **{cache_argument(model): cache})


@pytest.mark.parametrize("positions", POSITIONS)
def test_state_space_models(positions: str) -> None:
    """What they keep of the past has no length; padding would change it, so prompts go one by one."""
    model, vector = tiny_model("mamba"), vector_for("static", positions)
    for prompt in PROMPTS:
        one = {
            "input_ids": torch.tensor([prompt]),
            "max_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": 1,
        }
        with oracle(model, vector, [0], len(prompt)):
            wanted = model.generate(**one, use_cache=False)
        with attach(model, vector):
            assert torch.equal(model.generate(**one), wanted)


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_quantised_caches(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded keys change texts, so the roles are compared, pass by pass."""
    model = tiny_model("llama")
    how = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    try:
        generate(model, **how)
    except (ImportError, ValueError) as error:
        pytest.skip(f"this transformers cannot quantise a cache with {backend} here: {str(error)[:60]}")
    seen: list[Any] = []
    work_out = RoleTracker._work_out
    monkeypatch.setattr(RoleTracker, "_work_out", lambda *args: seen.append(work_out(*args)) or seen[-1])
    steered(model, vector_for("static", "last"), **how)
    assert torch.equal(seen[0], prompt_roles(MASK))
    assert len(seen) == NEW
    assert all(torch.equal(each, torch.full((3, 1), GENERATED)) for each in seen[1:])


@pytest.mark.parametrize("positions", SOME)
def test_loops_of_ones_own(positions: str) -> None:
    model, vector = tiny_model("llama"), vector_for("static", positions)
    prompt = IDS[2:]
    with oracle(model, vector, [0], WIDTH):
        wanted = model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=1)
    with attach(model, vector), torch.no_grad():
        # Without a cache, said which tokens are the prompt, and not said.
        for told in (True, False):
            ids = prompt
            with generating_from(prompt) if told else pytest.raises(AFTError, match="have grown"):
                for _ in range(4):
                    logits = model(ids, use_cache=False).logits
                    ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            assert not told or torch.equal(ids, wanted)
        # With a cache a token at a time needs no word.
        cache, new, ids = transformers.DynamicCache(config=model.config), prompt, prompt
        for _ in range(4):
            logits = model(new, **{cache_argument(model): cache}, use_cache=True).logits
            new = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
        assert torch.equal(ids, wanted)
        # Several behind a cache may be a prompt's rest or a draft.
        with pytest.raises(AFTError, match="may belong to the prompt"):
            model(prompt, **{cache_argument(model): cache}, use_cache=True)


def test_a_second_text_is_no_continuation() -> None:
    model = tiny_model("llama")
    with attach(model, vector_for("static", "last")), torch.no_grad():
        model(IDS[2:, :3], use_cache=False)
        model(IDS[2:, 1:], use_cache=False)  # begins otherwise: another prompt


def test_what_cannot_be_told_is_refused() -> None:
    model = tiny_model("llama")
    with attach(model, vector_for("static", "prompt")):
        with pytest.raises(AFTError, match="Classifier-free guidance"):
            generate(model, guidance_scale=2.0)
        with pytest.raises(AFTError, match="does not say where the prompt is padded"):
            model(IDS, attention_mask=torch.zeros(3, 1, WIDTH, WIDTH))
        hidden = torch.zeros(1, 3, 32)
        rotary = model.model.rotary_emb(hidden, torch.arange(3)[None])
        with pytest.raises(AFTError, match="called without the model"):
            model.model.layers[1](hidden, position_embeddings=rotary)


def test_caches_are_known_by_what_they_are() -> None:
    from lm_eval_aft.steering.intervention import _columns_before

    key = torch.zeros(2, 4, 5, 8)
    assert _columns_before([("past", ((key, key), (key, key)))]) == (5, "")
    assert _columns_before([("past_key_values", ())]) == (None, "")
    assert _columns_before([("input_ids", IDS), ("use_cache", True), ("cache", None)]) == (None, "")

    class States:
        def get_seq_length(self) -> int:
            raise ValueError("states have no length")

    assert _columns_before([("cache", States())]) == (None, "cache")
    assert _columns_before([("memory", type("PagedCache", (), {})())]) == (None, "memory")
    quantised = [
        name for name in ("QuantizedCache", "StaticCache", "DynamicCache") if hasattr(transformers, name)
    ]
    assert quantised


@pytest.mark.parametrize("positions", SOME)
@pytest.mark.parametrize("view", ["renamed", "hidden", "without length", "wrong length"])
def test_a_future_release_gives_an_error_or_the_right_text(
    view: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release in which the hooks see the cache otherwise: renamed, not at all, or with another meaning."""
    model, vector = tiny_model("llama"), vector_for("static", positions)
    wanted = expected(model, vector)
    sight = RoleTracker._work_out

    def seen(self: RoleTracker, inputs: Any) -> Any:
        changed = {}
        for key, value in inputs.items():
            if not callable(getattr(value, "get_seq_length", None)):
                changed[key] = value
            elif view == "renamed":
                changed["memory_of_the_row"] = value
            elif view == "without length":
                changed[key] = type("OtherCache", (), {})()
            elif view == "wrong length":
                changed[key] = type("OtherCache", (), {"get_seq_length": lambda self: 0})()
        if view == "hidden":
            changed.pop("attention_mask", None)
        return sight(self, changed)

    monkeypatch.setattr(RoleTracker, "_work_out", seen)
    if view in ("renamed", "without length"):
        assert torch.equal(steered(model, vector), wanted)
    else:
        with pytest.raises(AFTError, match="nothing says which tokens"):
            steered(model, vector)


def rename_the_caches_keyword(model: Any) -> None:
    """The model of a release whose `forward` and `generate` call the cache ``kv_store``."""
    name, forward = cache_argument(model), model.forward

    @wraps(forward)
    def renamed(*args: Any, kv_store: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **({} if kv_store is None else {name: kv_store}), **kwargs)

    model.forward = renamed
    prepare = model.prepare_inputs_for_generation

    def prepared(*args: Any, **kwargs: Any) -> Any:
        inputs = prepare(*args, **kwargs)
        if name in inputs:
            inputs["kv_store"] = inputs.pop(name)
        return inputs

    model.prepare_inputs_for_generation = prepared


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_caches_keyword_may_be_renamed(positions: str) -> None:
    vector = vector_for("static", positions)
    wanted = expected(tiny_model("llama"), vector)
    model = tiny_model("llama")
    rename_the_caches_keyword(model)
    assert torch.equal(steered(model, vector), wanted)


def requests_for(texts: list[str], **kwargs: Any) -> list[Instance]:
    settings = {"until": ["zzz"], "max_gen_toks": NEW, **kwargs}
    return [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(texts)]


def scoring_requests() -> list[Instance]:
    pairs = [("the cat sees", " the dog"), ("the cat sees", " one"), ("one", " two three")]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def takes_everything_for_a_prompt(self: RoleTracker, inputs: Any) -> Any:
    """What version 0.1 made of decoding steps under transformers 5.24."""
    return prompt_roles(torch.ones(inputs["input_ids"].shape[:2]))


def test_stock_generation_that_steers_other_tokens_is_not_used(
    checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the cat sees", "one", "a small fish likes the red tree"]
    vector = vector_for("static", "prompt")
    right = AFTLM(checkpoint("llama"), vector=vector).generate_until(requests_for(texts), disable_tqdm=True)
    monkeypatch.setattr(RoleTracker, "_work_out", takes_everything_for_a_prompt)
    lm = AFTLM(checkpoint("llama"), vector=vector)
    assert lm.generate_until(requests_for(texts), disable_tqdm=True) == right
    assert lm.paths_taken()["generated in shared batches"] == 3
    for settings in ({"fast": False}, {}):
        lm = AFTLM(checkpoint("llama"), vector=vector, **settings)
        sampled = requests_for(texts, do_sample=True, temperature=1.0)  # only stock draws samples
        with pytest.raises(AFTError, match=r"Stock generation .* transformers \d") as error:
            lm.generate_until(sampled, disable_tqdm=True)
        assert "differ by" in str(error.value)
    baseline = AFTLM(checkpoint("llama"), fast=False)
    assert len(baseline.generate_until(requests_for(texts), disable_tqdm=True)) == 3


def test_a_fast_way_that_steers_other_tokens_is_not_used(
    checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lm_eval_aft.engine import generation

    texts = ["the cat sees", "one"]
    vector = vector_for("static", "last")
    lm = AFTLM(checkpoint("llama"), vector=vector, fast=False)
    right = lm.generate_until(requests_for(texts), disable_tqdm=True)
    monkeypatch.setattr(generation, "LAST", generation.GENERATED)
    with caplog.at_level(logging.WARNING):
        lm = AFTLM(checkpoint("llama"), vector=vector)
        assert lm.generate_until(requests_for(texts), disable_tqdm=True) == right
    assert "Generation is left to stock" in caplog.text


@pytest.mark.parametrize("fast", [True, False])
def test_scoring_that_steers_other_tokens_is_not_used(
    fast: bool, checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval_aft.engine import rows, stock

    vector = vector_for("static", "last")
    right = AFTLM(checkpoint("llama"), vector=vector, fast=fast).loglikelihood(
        scoring_requests(), disable_tqdm=True
    )
    monkeypatch.setattr(stock, "row_roles", lambda context, tail, *_: [1] * context + [2] * tail)
    if fast:
        lm = AFTLM(checkpoint("llama"), vector=vector)
        found = lm.loglikelihood(scoring_requests(), disable_tqdm=True)
        assert [a for a, _ in found] == pytest.approx([a for a, _ in right], abs=1e-4)
        monkeypatch.setattr(rows, "LAST", rows.CONTEXT)  # now no way is right
    with pytest.raises(AFTError, match="Stock scoring would not steer"):
        AFTLM(checkpoint("llama"), vector=vector, fast=fast).loglikelihood(
            scoring_requests(), disable_tqdm=True
        )


def test_attaching_twice_and_removing_in_any_order() -> None:
    model = tiny_model("llama")
    one, two = (
        vector_for("static", "prompt"),
        replace(vector_for("static", "generated", (2,)), coefficient=2.0),
    )
    wanted = {}
    for key, vectors in {"one": [one], "both": [one, two]}.items():
        pads = [WIDTH - len(prompt) for prompt in PROMPTS]
        with oracle(model, vectors[0], pads, WIDTH), oracle(model, vectors[-1], pads, WIDTH):
            if key == "both":
                wanted[key] = generate(model, use_cache=False)
    wanted["one"], wanted["none"] = expected(model, one), generate(model)
    first, second = attach(model, one), attach(model, two)
    assert torch.equal(generate(model), wanted["both"])
    second.remove()
    assert torch.equal(generate(model), wanted["one"])
    third = attach(model, two)
    first.remove()
    assert torch.equal(generate(model), expected_of(model, two, third))
    third.remove()
    assert torch.equal(generate(model), wanted["none"])
    assert not {"generate", "_aft_passes"} & model.__dict__.keys()


def expected_of(model: Any, vector: SteeringVector, handle: Any) -> torch.Tensor:
    handle.remove()
    found = expected(model, vector)
    handle._hooks += attach(model, vector)._hooks
    return found


def test_wrapped_models(checkpoint: Callable[..., str]) -> None:
    peft = pytest.importorskip("peft")
    vector = vector_for("static", "generated")
    inner = tiny_model("llama")
    model = peft.get_peft_model(
        inner, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True)
    )
    wanted = expected(tiny_model("llama"), vector)
    with attach(model, vector):
        assert torch.equal(generate(model), wanted)
        assert torch.equal(generate(inner), wanted)
    prompted = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with attach(prompted, vector), pytest.raises(AFTError, match="nothing says which tokens"):
        generate(prompted)
