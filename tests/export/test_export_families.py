"""Every family: exact by which route, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lm_eval_aft import AFTError, SteeringVector
from lm_eval_aft.export.formats import export_vector
from lm_eval_aft.steering.hooks import attach
from tests.conftest import tiny_model, tiny_tokenizer

# family -> (architecture of the merged checkpoint, where the vector lies) or a part of the refusal
MERGED: dict[str, tuple[str, str] | str] = {
    "gpt_neox": ("gpt_neox", "mlp.dense_4h_to_h"),
    "llama": ("llama", "mlp.down_proj"),
    "qwen2": ("llama", "mlp.down_proj"),
    "qwen2-window": ("smollm3", "mlp.down_proj"),
    "qwen3": ("hy_v3", "mlp.down_proj"),
    "mistral": ("llama", "mlp.down_proj"),
    "mistral-window": ("smollm3", "mlp.down_proj"),
    "phi": ("phi", "mlp.fc2"),
    "phi3": ("llama", "mlp.down_proj"),
    "phi3-window": ("smollm3", "mlp.down_proj"),
    "gpt2": ("gpt2", "mlp.c_proj"),
    "gptj": ("gptj", "mlp.fc_out"),
    "gpt_neo": ("gpt_neo", "mlp.c_proj"),
    "opt": ("opt", "fc2"),
    "bloom": ("bloom", "mlp.dense_4h_to_h"),
    "granite": ("granite", "mlp.down_proj"),
    "smollm3": ("smollm3", "mlp.down_proj"),
    "falcon": ("falcon", "mlp.dense_4h_to_h"),
    "falcon-rope": ("falcon", "mlp.dense_4h_to_h"),
    "starcoder2": ("starcoder2", "mlp.c_proj"),
    "cohere": ("cohere", "self_attn.o_proj"),
    "gemma": ("granite", "mlp.down_proj"),
    "olmo": ("llama", "mlp.down_proj"),
    "stablelm": "LayerNorms with biases, partial rotary embeddings and gated MLP",
    "glm": "no family that computes the same",
    "gemma2": "post-norm",
    "olmo2": "post-norm",
    "opt-post": "normalises the residual stream itself",
    "mixtral": "mixture of experts",
}
# Each kind of route once, by default; the rest with the slow tests.
OFTEN = ("gpt_neox", "llama", "qwen2", "qwen3", "stablelm", "gpt2", "granite", "gemma2")
PEFT_OFTEN = ("gpt_neox", "gpt2", "granite", "falcon", "stablelm", "gemma2")
PEFT_REFUSED = ("gemma2", "olmo2", "opt-post", "mixtral")
EXACT = 1e-5


def families(often: tuple[str, ...]) -> list[Any]:
    return [pytest.param(f, marks=[] if f in often else [pytest.mark.slow]) for f in MERGED]


def make(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Save a tiny model none of whose norms and biases are ones and zeros; return it."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model = model.to(dtype)
    model.generation_config.max_new_tokens = 11
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def some_vector(*layers: int, coefficient: float = 0.7) -> SteeringVector:
    generator = torch.Generator().manual_seed(5)
    return SteeringVector({n: torch.randn(32, generator=generator) for n in layers}, coefficient)


def load(folder: Path) -> Any:
    """With plain transformers, nothing of ours."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def answers(model: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Logits of one prompt, of a left-padded batch, and greedy tokens with the cache."""
    generator = torch.Generator().manual_seed(11)
    alone = torch.randint(2, 64, (1, 20), generator=generator)
    batch = torch.randint(2, 64, (2, 12), generator=generator)
    mask = torch.ones_like(batch)
    batch[0, :5], mask[0, :5] = 1, 0
    padded = model(input_ids=batch, attention_mask=mask).logits
    tokens = model.generate(
        alone, attention_mask=torch.ones_like(alone), do_sample=False, max_new_tokens=12, pad_token_id=1
    )
    return model(input_ids=alone).logits, padded[mask.bool()], tokens[0].tolist()


@pytest.mark.parametrize("family", families(OFTEN))
def test_merged(family: str, tmp_path: Path) -> None:
    expected = MERGED[family]
    base = make(family, tmp_path / "base")
    vector = some_vector(1, 3)
    target = tmp_path / "merged"
    if isinstance(expected, str):
        with pytest.raises(AFTError, match=expected) as caught:
            export_vector(vector, "merged", target, model=str(tmp_path / "base"))
        assert caught.value.hint.startswith("Use --to ")
        assert [path.name for path in tmp_path.iterdir()] == ["base"]
        return
    made = export_vector(vector, "merged", target, model=str(tmp_path / "base"))
    assert made.agreement is not None
    assert made.agreement.difference <= EXACT
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == expected[0]
    assert "auto_map" not in config
    assert expected[1] in made.notes[0]
    merged = load(target)
    with attach(base, vector):
        wanted = answers(base)
    found = answers(merged)
    assert float((found[0] - wanted[0]).abs().max()) <= EXACT
    assert float((found[1] - wanted[1]).abs().max()) <= EXACT
    assert found[2] == wanted[2]
    assert float((answers(base)[0] - wanted[0]).abs().max()) > 0.05
    # All that may go with it: biases of zero, in no more than the blocks' own Linears.
    if config["model_type"] == family:
        before, after = base.state_dict(), merged.state_dict()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert all(name.endswith(".bias") for name in changed)
        new = {name: tensor for name, tensor in after.items() if name not in before}
        assert sum(bool(t.any()) for t in new.values()) + len(changed) == 2


@pytest.mark.parametrize("family", families(PEFT_OFTEN))
def test_peft(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = make(family, tmp_path / "base")
    vector = some_vector(0, 2)
    target = tmp_path / "adapter"
    if family in PEFT_REFUSED:
        with pytest.raises(AFTError) as caught:
            export_vector(vector, "peft", target, model=str(tmp_path / "base"))
        assert "--to steered" in caught.value.hint
        return
    export_vector(vector, "peft", target, model=str(tmp_path / "base"))
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "aft.json"} == {
        path.name for path in target.iterdir()
    }
    assert (target / "adapter_model.safetensors").stat().st_size < 4000
    with attach(base, vector):
        wanted = answers(base)
    found = answers(peft.PeftModel.from_pretrained(load(tmp_path / "base"), str(target)).eval())
    assert float((found[0] - wanted[0]).abs().max()) <= EXACT
    assert float((found[1] - wanted[1]).abs().max()) <= EXACT
    assert found[2] == wanted[2]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "opt-post", "mixtral"])
def test_steered_works_where_nothing_else_does(family: str, tmp_path: Path) -> None:
    make(family, tmp_path / "base")
    made = export_vector(some_vector(0, 2), "steered", tmp_path / "v.pt", model=str(tmp_path / "base"))
    assert made.agreement is not None
    assert made.agreement.difference == 0
    content = torch.load(tmp_path / "v.pt", weights_only=True)
    assert [set(entry) for entry in content.values()] == [
        {"steering_vector", "steering_coefficient", "action"}
    ] * 2


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt_neox", torch.bfloat16),
        ("qwen2", torch.bfloat16),
        ("granite", torch.float16),
        ("opt", torch.float16),
    ],
)
def test_the_dtype_is_kept_and_the_vector_rounded_once(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = make(family, tmp_path / "base", dtype)
    vector = some_vector(2)
    made = export_vector(vector, "merged", tmp_path / "merged", model=str(tmp_path / "base"))
    merged = load(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert any("rounding to" in note for note in made.notes)
    (name,) = (n for n in merged.state_dict() if n.endswith(f"2.{MERGED[family][1]}.bias"))
    existing = base.state_dict().get(name, torch.zeros(32, dtype=dtype))
    scale = getattr(base.config, "residual_multiplier", 1.0)
    wanted = (existing.float() + vector.layers[2] * vector.coefficient / scale).to(dtype)
    assert torch.equal(merged.state_dict()[name], wanted)
    before, after = base.state_dict(), merged.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if n != name)


@pytest.mark.parametrize("family", ["gemma", "olmo"])
def test_what_float32_alone_can_express_is_refused_in_bfloat16(family: str, tmp_path: Path) -> None:
    make(family, tmp_path / "base", torch.bfloat16)
    with pytest.raises(AFTError, match="exactly in float32 only") as caught:
        export_vector(some_vector(2), "merged", tmp_path / "merged", model=str(tmp_path / "base"))
    assert "--to peft" in caught.value.hint


@pytest.mark.parametrize(("family", "layer"), [("gpt2", 0), ("qwen2", 3)])
def test_first_and_last_block(family: str, layer: int, tmp_path: Path) -> None:
    base = make(family, tmp_path / "base")
    vector = some_vector(layer)
    export_vector(vector, "merged", tmp_path / "merged", model=str(tmp_path / "base"))
    with attach(base, vector):
        wanted = answers(base)
    assert float((answers(load(tmp_path / "merged"))[0] - wanted[0]).abs().max()) <= EXACT
