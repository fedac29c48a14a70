"""A base model is recognised in any dtype, and told apart from everything near it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from lm_eval_aft import AFTError, SteeringVector, attach
from lm_eval_aft.steering.fingerprint import compare_fingerprints, fingerprint
from tests.conftest import tiny_model, tiny_tokenizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(("one", "other"), itertools.product(DTYPES, DTYPES))
def test_dtype_does_not_matter(stored: torch.dtype, one: torch.dtype, other: torch.dtype) -> None:
    model = tiny_model("llama").to(stored)
    prints = [fingerprint(copy.deepcopy(model).to(dtype), tiny_tokenizer()) for dtype in (one, other)]
    assert compare_fingerprints(*prints) == []


def test_other_models_differ() -> None:
    base = fingerprint(tiny_model("llama"), tiny_tokenizer())
    assert compare_fingerprints(base, fingerprint(tiny_model("llama", seed=1))) == ["weights"]
    assert "parameter names or shapes" in compare_fingerprints(
        base, fingerprint(tiny_model("llama", layers=3))
    )
    assert "architecture" in compare_fingerprints(base, fingerprint(tiny_model("qwen2")))
    other_words = tiny_tokenizer()
    other_words.add_tokens(["hippopotamus"])
    found = compare_fingerprints(base, fingerprint(tiny_model("llama"), other_words))
    assert found == ["tokenizer vocabulary"]


@pytest.mark.parametrize("target", ["q_proj", "v_proj", "down_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_lora_differs(target: str, dtype: torch.dtype) -> None:
    from peft import LoraConfig, get_peft_model

    base = fingerprint(tiny_model("llama", dtype=dtype))
    wrapped = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=[target], r=2, init_lora_weights=False)
    )
    merged = wrapped.merge_and_unload().to(dtype)
    assert compare_fingerprints(base, fingerprint(merged)) == ["weights"]


def test_one_optimiser_step_differs() -> None:
    model = tiny_model("llama")
    base = fingerprint(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(5, 60, (2, 12))
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    assert compare_fingerprints(base, fingerprint(model)) == ["weights"]


def test_a_vector_for_another_model_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    trained_on = tiny_model("llama")
    metadata = {"fingerprint": fingerprint(trained_on), "base_model": {"name": "org/trained-on"}}
    vector = SteeringVector({0: torch.ones(32)}, metadata=metadata)
    attach(trained_on, vector).remove()
    other = tiny_model("llama", seed=1)
    other.config._name_or_path = "org/other"
    with pytest.raises(AFTError, match=r"trained on 'org/trained-on', not on 'org/other': weights differ"):
        attach(other, vector)
    attach(other, vector, allow_mismatch=True).remove()
    assert "trained on 'org/trained-on'" in caplog.text


def test_a_damaged_fingerprint_is_an_error_not_a_crash() -> None:
    vector = SteeringVector({0: torch.ones(32)}, metadata={"fingerprint": {"config": "x"}})
    with pytest.raises(AFTError, match="fingerprint is damaged"):
        attach(tiny_model("llama"), vector)
