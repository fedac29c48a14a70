"""Finding the Linear that can stand for a vector, and comparing logits strictly in any dtype."""

from __future__ import annotations

import math

import pytest
import torch

from lm_eval_aft import AFTError
from lm_eval_aft.export import base
from lm_eval_aft.export.base import (
    ComputingInFloat32,
    compare_logits,
    probe_logits,
    probe_prompts,
    require_agreement,
)
from lm_eval_aft.export.merged import find_bias_slots
from lm_eval_aft.steering.backbone import find_backbone
from tests.conftest import tiny_model


@pytest.mark.parametrize(
    ("family", "names", "scale"),
    [
        ("llama", ["mlp.down_proj"], 1.0),
        ("granite", ["mlp.down_proj"], 0.5),
        ("gpt2", ["mlp.c_proj"], 1.0),
        ("opt", ["fc2"], 1.0),
        # A parallel block adds what attention and MLP write; either would do.
        ("phi", ["mlp.fc2", "self_attn.dense"], 1.0),
        ("gemma2", [], 1.0),
        ("olmo2", [], 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots(family: str, names: list[str], scale: float, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    for layer in (0, 3):
        slots = find_bias_slots(model, find_backbone(model), layer)
        assert [slot.name for slot in slots] == names
        assert all(slot.scale == scale for slot in slots)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "falcon", "bloom", "gemma2"])
@pytest.mark.parametrize("chunk", [2**22, 200])
def test_float32_arithmetic_without_a_float32_copy(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_CHUNK", chunk)
    model = tiny_model(family, dtype=torch.bfloat16)
    prompts = probe_prompts(model.config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = probe_logits(model, prompts)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    wanted = probe_logits(model.float(), prompts)
    assert all(logits.dtype == torch.float32 for logits in found)
    assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) < 1e-5


def test_weights_come_back_after_an_error() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), ComputingInFloat32():
        model(input_ids=torch.tensor([[1, 2]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_prompts_outrun_a_sliding_window() -> None:
    short = probe_prompts(tiny_model("llama").config)
    long = probe_prompts(tiny_model("mistral-window").config)
    assert [list(ids.shape) for ids in short] == [[3, 16]]
    assert [list(ids.shape) for ids in long] == [[3, 16], [1, 22]]


def test_comparing() -> None:
    base, steered = [torch.zeros(1, 2, 3)], [torch.full((1, 2, 3), 50.0)]
    assert require_agreement(
        compare_logits(base, steered, [steered[0] + 4e-4]), "export"
    ).bound == pytest.approx(5e-4)
    for export in (steered[0] + 6e-4, steered[0] * math.nan, torch.zeros(1, 2, 4)):
        with pytest.raises(AFTError, match="does not compute what the vector does"):
            require_agreement(compare_logits(base, steered, [export]), "export")
    with pytest.raises(AFTError, match="does not compute"):  # not hidden by the prompts that agree
        require_agreement(
            compare_logits(base * 2, steered * 2, [steered[0], steered[0] * math.nan]), "export"
        )
    with pytest.raises(AFTError, match="too little to verify"):
        require_agreement(
            compare_logits(base, [torch.full((1, 2, 3), 1e-7)], [torch.zeros(1, 2, 3)]), "export"
        )
