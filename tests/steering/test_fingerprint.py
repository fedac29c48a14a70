"""A base model is recognised in any dtype, and told apart from everything near it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_eval_aft import AFTError, SteeringVector, attach
from lm_eval_aft.steering.backbone import find_backbone
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


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("way", ["memory", "disk", "some", "compiled", "compiled blocks"])
def test_ties_and_compilation_do_not_change_the_identity(family: str, way: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    made: Any = tiny_model(family.partition("-")[0])
    if family == "llama-tied":
        made.config.tie_word_embeddings = True
        made = type(made)(made.config).eval()
    model, wanted = copy.deepcopy(made), fingerprint(made)
    assert "lm_head.weight" not in dict(model.named_parameters())
    if way == "memory":
        accelerate.cpu_offload(model, execution_device="cpu")
        assert "lm_head.weight" in dict(model.named_parameters())
    elif way == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    elif way == "some":
        blocks = find_backbone(model).name
        places = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
        places |= {"lm_head": "disk"}
        made.save_pretrained(tmp_path / "saved")
        model = type(made).from_pretrained(
            tmp_path / "saved", device_map={**places, blocks: "cpu"}, offload_folder=str(tmp_path)
        )
    elif way == "compiled":
        model = torch.compile(model)
    else:
        blocks = model.get_submodule(find_backbone(model).name)
        blocks[1] = torch.compile(blocks[1])
    found = fingerprint(model)
    assert found["parameters"] == wanted["parameters"]
    assert compare_fingerprints(wanted, found) == []


def test_untied_weights_are_two() -> None:
    tied: Any = tiny_model("gpt2")
    wanted = fingerprint(tied)
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    assert compare_fingerprints(wanted, fingerprint(tied)) == ["parameter names or shapes"]
