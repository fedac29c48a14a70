"""Exports and imports of odd, damaged or hostile things: nothing lost unsaid, no traceback."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_eval_aft import AFTError, SteeringVector
from lm_eval_aft.evaluation.compare import SELECTED
from lm_eval_aft.evaluation.report import compare
from lm_eval_aft.export.base import RECORD_NAME
from lm_eval_aft.export.formats import export_vector, import_vector
from lm_eval_aft.steering.fingerprint import fingerprint
from tests.result_folders import digest, steered_by, write_results
from tests.support.families import tiny_model, tiny_tokenizer

TASK = "arc_challenge"
OUTPUTS = {"merged": "out", "peft": "out", "gguf": "out.gguf", "steered": "out.pt"}


def some_vector(coefficient: float = 0.7, size: float = 1.0, **metadata: Any) -> SteeringVector:
    values = torch.randn(32, generator=torch.Generator().manual_seed(5)) * size
    return SteeringVector({2: values}, coefficient, metadata=metadata)


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    tiny_model(family, dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# --- what is known of the vector goes out and comes back


@pytest.mark.parametrize("kind", ["peft", "gguf"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_how_it_was_chosen_survives_a_round_trip(kind: str, family: str, tmp_path: Path) -> None:
    pytest.importorskip(kind)
    base = saved(family, tmp_path / "base")
    meta = {
        "task": TASK,
        "control": "shuffled",
        "seed": 3,
        "protocol": {"name": "study", "biased": True},
        "splits": {"selection_documents": ["ab" * 8]},
        "base_model": {"name": base, "revision": "step1000"},
        "fingerprint": fingerprint(tiny_model(family), tiny_tokenizer()),
    }
    made = export_vector(some_vector(**meta), kind, tmp_path / OUTPUTS[kind])
    assert any("placebo" in note for note in made.notes)
    assert any("biased" in note for note in made.notes)
    folder, notes = import_vector(tmp_path / OUTPUTS[kind], tmp_path / "back")
    back = SteeringVector.load(folder).metadata
    assert {key: back[key] for key in meta} == meta
    assert back["imported_from"]["format"] == kind
    assert any("biased" in note for note in notes)


@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_cards_tell_of_bias_placebos_and_the_revision(
    kind: str, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    biased = some_vector(protocol={"name": "biased"}, control="random")
    export_vector(biased, kind, tmp_path / "out", model=checkpoint("llama"), revision="step1000")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "placebo (control `random`)" in card
    assert "**This vector is biased:" in card
    assert "revision `step1000`" in card
    assert json.loads((tmp_path / "out" / RECORD_NAME).read_text())["control"] == "random"
    export_vector(some_vector(), kind, tmp_path / "plain", model=checkpoint("llama"))
    plain = (tmp_path / "plain" / "README.md").read_text()
    assert not any(word in plain for word in ("placebo", "iased", "revision"))


def test_an_adapter_names_the_revision(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    export_vector(some_vector(), "peft", tmp_path / "out", model=checkpoint("llama"), revision="step1000")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == "step1000"
    folder, _ = import_vector(tmp_path / "out", tmp_path / "back")
    assert SteeringVector.load(folder).metadata["base_model"]["revision"] == "step1000"


def test_a_record_counts_for_its_own_values_only(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapter, weights = tmp_path / "out", tmp_path / "out" / "adapter_model.safetensors"
    export_vector(some_vector(control="random"), "peft", adapter, model=checkpoint("llama"))
    held = load_file(weights)
    save_file({name: t.bfloat16() for name, t in held.items()}, weights)
    assert SteeringVector.load(import_vector(adapter, tmp_path / "cast")[0]).metadata["control"] == "random"
    save_file({name: t.flip(-1).contiguous() for name, t in held.items()}, weights)
    folder, notes = import_vector(adapter, tmp_path / "other")
    assert "control" not in SteeringVector.load(folder).metadata
    assert any("written for other values" in note for note in notes)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"a": NaN}', '{"a": 1e999}', '{"splits": 5}'])
def test_damaged_records_are_refused(text: str, checkpoint: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    export_vector(some_vector(), "peft", tmp_path / "out", model=checkpoint("llama"))
    (tmp_path / "out" / RECORD_NAME).write_text(text)
    with pytest.raises(AFTError, match="is damaged"):
        import_vector(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_import_for_another_model_is_told(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    own = fingerprint(tiny_model("llama"), tiny_tokenizer())
    vector = some_vector(base_model={"name": "the/first"}, fingerprint=own)
    export_vector(vector, "gguf", tmp_path / "v.gguf", model=checkpoint("llama"))
    _, notes = import_vector(tmp_path / "v.gguf", tmp_path / "same", model=checkpoint("llama"))
    assert not any("trained on" in note for note in notes)
    folder, notes = import_vector(tmp_path / "v.gguf", tmp_path / "other", model=checkpoint("llama", 1))
    assert any("trained on 'the/first', not on this model" in note for note in notes)
    assert SteeringVector.load(folder).metadata["imported_from"]["trained_on"] == "the/first"


# --- reports


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ({}, True),
        ({"task": TASK, "imported_from": {"format": "gguf"}}, True),
        ({"protocol": {"name": "default"}}, False),
        ({"splits": {"selection_documents": []}}, False),
        ({"recipe": {"expression": "a/b"}}, False),
    ],
)
def test_a_verdict_on_a_vector_without_a_record(meta: dict[str, Any], told: bool, tmp_path: Path) -> None:
    vector = SteeringVector({3: torch.ones(8)}, metadata=meta)
    vector.save(tmp_path / "v")
    before = write_results(tmp_path / "base", {TASK: [0.0] * 30 + [1.0] * 30})
    after = write_results(
        tmp_path / "steered",
        {TASK: [1.0] * 60},
        vector=steered_by(sha256=vector.digest()),
        config={"model_args": {"pretrained": "some/model", "vector": str(tmp_path / "v")}},
    )
    warnings = compare(before, after).warnings
    assert any("how the vector was chosen is not recorded" in each for each in warnings) == told


def test_a_round_trip_does_not_make_a_result_of_a_biased_vector(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    chosen_on = digest(json.dumps({"question": "Question 7?"}, indent=2))
    vector = some_vector(splits={"selection_documents": [chosen_on]})
    export_vector(vector, "gguf", tmp_path / "v.gguf", model=saved("llama", tmp_path / "model"))
    folder, _ = import_vector(tmp_path / "v.gguf", tmp_path / "back")
    before = write_results(tmp_path / "base", {TASK: [0.0] * 30 + [1.0] * 30})
    after = write_results(
        tmp_path / "steered",
        {TASK: [1.0] * 60},
        vector=steered_by(sha256=SteeringVector.load(folder).digest()),
        config={"model_args": {"pretrained": "some/model", "vector": str(folder.resolve())}},
    )
    assert [row.verdict for row in compare(before, after).rows] == [SELECTED]


# --- numbers


@pytest.mark.parametrize(
    ("coefficient", "match"), [(3e38, "overflows float32"), (1e-40, "would change nothing")]
)
@pytest.mark.parametrize("kind", sorted(OUTPUTS))
def test_coefficients_that_leave_float32(
    kind: str, coefficient: float, match: str, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    vector = SteeringVector({1: torch.full((32,), 3e-10 if coefficient < 1 else 3.0)}, coefficient)
    with pytest.raises(AFTError, match=match):
        export_vector(vector, kind, tmp_path / OUTPUTS[kind], model=checkpoint("llama"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "fits"), [(0.1, True), (0.003, False)])
def test_a_vector_lost_in_rounding_is_not_merged(size: float, fits: bool, tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    with torch.no_grad():
        for block in model.gpt_neox.layers:
            block.mlp.dense_4h_to_h.bias.copy_(
                torch.randn(32, generator=torch.Generator().manual_seed(0)) * 2
            )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    vector = some_vector(coefficient=1.0, size=size)
    if fits:
        notes = export_vector(vector, "merged", tmp_path / "out", model=str(tmp_path / "base")).notes
        assert any("from the vector before rounding, logits differ" in note for note in notes)
        return
    with pytest.raises(AFTError, match="Rounding to bfloat16.*would move the vector"):
        export_vector(vector, "merged", tmp_path / "out", model=str(tmp_path / "base"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("kind", ["merged", "peft"])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_weights_that_are_read_past_their_modules_in_16_bits(family: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = saved(family, tmp_path / "base", torch.bfloat16)
    assert export_vector(some_vector(), kind, tmp_path / "out", model=base).agreement is not None


# --- a tokenizer that is there is not left out


def test_a_damaged_tokenizer_is_not_left_out(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(AFTError, match=r"tokenizer of .* cannot be read"):
        export_vector(some_vector(), "merged", tmp_path / "out", model=base)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    made = export_vector(some_vector(), "merged", tmp_path / "out", model=str(tmp_path / "base"))
    assert any("no tokenizer was found" in note for note in made.notes)


# --- adapters by strangers


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"r": None}),
        ("gpt2", {"r": 0}),
        ("gpt2", {"r": "x"}),
        ("gpt2", {"r": True}),
        ("gpt2", {"lora_alpha": [1]}),
        ("llama", {"base_model_name_or_path": ["a"]}),
        ("llama", {"base_model_name_or_path": 5}),
        ("llama", {"revision": 5}),
        ("llama", {"peft_type": ["BEFT"]}),
        ("llama", {"target_modules": 5}),
        ("llama", {"target_modules": "("}),
        ("llama", {"target_modules": ["nothing"]}),
    ],
)
def test_odd_adapter_configs(
    family: str, changes: dict[str, Any], checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    export_vector(some_vector(), "peft", tmp_path / "out", model=checkpoint(family))
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(AFTError):
        import_vector(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_odd_adapter_files(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    export_vector(some_vector(), "peft", tmp_path / "out", model=checkpoint("llama"))
    shutil.copytree(tmp_path / "out", tmp_path / "deep")
    (tmp_path / "deep" / "adapter_config.json").write_text("[" * 100_000)
    for layer in ("²²", "9" * 5000):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj.beft_bias"
        save_file({name: torch.ones(1, 32)}, tmp_path / "out" / "adapter_model.safetensors")
        with pytest.raises(AFTError, match="in no block"):
            import_vector(tmp_path / "out", tmp_path / "back")
    with pytest.raises(AFTError, match="cannot be read"):
        import_vector(tmp_path / "deep", tmp_path / "back")


# --- control vectors by strangers


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(entries: int, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)


ARRAY = text("general.architecture") + struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (header(1) + ARRAY + struct.pack("<IQ", 0, 2**40), "elements in one array"),
        (header(1) + ARRAY + struct.pack("<IQ", 0, 5000), "fewer are left"),
        (header(1) + ARRAY + struct.pack("<IQ", 9, 1) * 5000, "arrays of arrays"),
        (header(1) + struct.pack("<Q", 2**60), "declares a text"),
        (header(2**50), "entries"),
        (header(0, 2**50), "tensors"),
        (header(1) + text("a") + struct.pack("<I", 77), "type 77"),
        (header(1) + text("a"), "in the middle"),
        (b"GGUF" + struct.pack("<I", 99), "version 99"),
    ],
)
def test_declared_lengths_are_not_believed(content: bytes, match: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "v.gguf").write_bytes(content)
    with pytest.raises(AFTError, match=match):
        import_vector(tmp_path / "v.gguf", tmp_path / "back")


def test_files_of_the_other_byte_order_are_still_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("direction.1", np.arange(1, 33, dtype=np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    folder, _ = import_vector(tmp_path / "v.gguf", tmp_path / "back")
    assert SteeringVector.load(folder).layers[1].tolist() == list(range(1, 33))


@pytest.mark.parametrize(("layer", "match"), [("²", "named"), ("9" * 50, "that many blocks")])
def test_odd_layers_of_a_control_vector(layer: str, match: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_tensor(f"direction.{layer}", np.ones(32, np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    with pytest.raises(AFTError, match=match):
        import_vector(tmp_path / "v.gguf", tmp_path / "back")
