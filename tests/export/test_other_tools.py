"""What other tools write: read where it is an added vector, else refused with the reason."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lm_eval_aft import AFTError, SteeringVector, load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.export.formats import export_vector, import_vector
from lm_eval_aft.steering.hooks import attach
from tests.conftest import tiny_model


def rows(*blocks: int, width: int = 32) -> dict[int, np.ndarray[Any, Any]]:
    return {n: np.random.default_rng(n).normal(size=width).astype(np.float32) for n in blocks}


def control_vector(path: Path, directions: dict[int, Any], **entries: str | float) -> Path:
    """As EasySteer, repeng and llama.cpp's generator write it; ``entries`` as EasySteer adds them."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "unknown")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for key, value in entries.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"controlvector.{key}", value)
    for block, values in directions.items():
        writer.add_tensor(f"direction.{block}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def lens(path: Path, values: Any, blocks: list[int], **changes: Any) -> Path:
    """As vllm-lens's SteeringVector.model_dump_json writes it, not compressed unless ``changes`` say so."""
    values = np.asarray(values, np.float32)
    tensor = {
        "data": base64.b64encode(values.tobytes()).decode(),
        "dtype": "float32",
        "original_dtype": "torch.float32",
        "shape": list(values.shape),
    }
    whole = {
        "activations": tensor,
        "layer_indices": blocks,
        "scale": 1.0,
        "norm_match": False,
        "position_indices": None,
    }
    path.write_text(json.dumps(whole | changes))
    return path


# --- EasySteer, repeng, llama.cpp


def test_direction_0_is_added_after_block_0(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    """As EasySteer writes a file: every block, from 0 on, and entries of its own."""
    directions = rows(0, 1, 2, 3)
    source = control_vector(tmp_path / "v.gguf", directions, method="diffmean", normalize=1.0, token_pos=-1.0)
    folder, notes = import_vector(source, tmp_path / "v", model=checkpoint("llama"))
    vector = SteeringVector.load(folder)
    assert list(vector.layers) == [0, 1, 2, 3]
    assert vector.metadata["imported_from"]["method"] == "diffmean"
    assert any("its norm at each of its 4 blocks is" in note for note in notes)

    model, caught = tiny_model("llama"), []
    ids = torch.arange(2, 30)[None]
    for block in model.model.layers[:1]:
        block.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    with torch.no_grad():
        model(ids)
        with attach(model, vector):
            model.model.layers[0].register_forward_hook(lambda _m, _i, output: caught.append(output))
            model(ids)
    plain, steered = (x[0] if isinstance(x, tuple) else x for x in (caught[0], caught[-1]))
    moved = (steered - plain).reshape(-1, 32)
    assert torch.allclose(moved, torch.from_numpy(directions[0]).expand_as(moved), atol=1e-6)


def test_numbers_from_1_on_mean_the_same_blocks_as_in_llama_cpp(tmp_path: Path) -> None:
    directions = rows(1, 2, 3)
    folder, _ = import_vector(control_vector(tmp_path / "v.gguf", directions), tmp_path / "v")
    layers = SteeringVector.load(folder).layers
    assert {n: values.tolist() for n, values in layers.items()} == {
        n: v.tolist() for n, v in directions.items()
    }


def test_single_blocks_of_a_file_can_be_kept(tmp_path: Path) -> None:
    directions = rows(*range(6))
    source = control_vector(tmp_path / "v.gguf", directions)
    result = CliRunner().invoke(
        aft, ["import", str(source), "--layer", "4", "--layer", "2", "-o", str(tmp_path / "v")]
    )
    assert result.exit_code == 0, result.output
    assert "Only block 2, 4 was kept." in result.output
    assert {n: v.tolist() for n, v in load_vector(tmp_path / "v").layers.items()} == {
        n: directions[n].tolist() for n in (2, 4)
    }
    with pytest.raises(AFTError, match="holds nothing for block 9"):
        import_vector(source, tmp_path / "none", layers=[9])
    assert not (tmp_path / "none").exists()


def test_files_that_count_from_1_or_fit_no_block_are_told(
    checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    counted = control_vector(tmp_path / "one.gguf", rows(1, 2, 3, 4))
    with pytest.raises(AFTError, match="seems to count from 1"):
        import_vector(counted, tmp_path / "v", model=checkpoint("llama"))
    with pytest.raises(AFTError, match="Layer 7 is out of range"):
        import_vector(control_vector(tmp_path / "7.gguf", rows(0, 7)), tmp_path / "v", model=checkpoint())
    narrow = control_vector(tmp_path / "narrow.gguf", rows(1, width=8))
    with pytest.raises(AFTError, match="hidden size 8, the model 32"):
        import_vector(narrow, tmp_path / "v", model=checkpoint("llama"))
    assert not (tmp_path / "v").exists()


# --- vllm-lens


def test_vllm_lens_is_read_and_written(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    values = rows(0, 2)
    source = lens(tmp_path / "v.json", list(values.values()), [0, 2], scale=2.5)
    folder, notes = import_vector(source, tmp_path / "v", model=checkpoint("llama"))
    vector = SteeringVector.load(folder)
    assert vector.coefficient == 2.5
    assert {n: v.tolist() for n, v in vector.layers.items()} == {n: v.tolist() for n, v in values.items()}
    assert any("scale 2.5" in note for note in notes)

    export_vector(vector, "vllm-lens", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["layer_indices"] == [0, 2]
    assert (written["scale"], written["norm_match"]) == (1.0, False)
    data = np.frombuffer(base64.b64decode(written["activations"]["data"]), np.float32).reshape(2, 32)
    assert np.array_equal(data, np.stack(list(values.values())) * np.float32(2.5))


def test_vllm_lens_in_bfloat16(tmp_path: Path) -> None:
    values = torch.arange(32).float().bfloat16()[None] / 3
    tensor = {
        "data": base64.b64encode(values.view(torch.int16).numpy().tobytes()).decode(),
        "dtype": "int16",
        "original_dtype": "torch.bfloat16",
        "shape": [1, 32],
    }
    source = lens(tmp_path / "v.json", [[0.0]], [3], activations=tensor)
    folder, _ = import_vector(source, tmp_path / "v")
    assert torch.equal(SteeringVector.load(folder).layers[3], values[0].float())


def test_compressed_vllm_lens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package a hint; with it (here one that turns the bytes round) what it decompresses."""
    values = rows(1)[1][None]
    tensor = {
        "data": base64.b64encode(values.tobytes()[::-1]).decode(),
        "dtype": "float32",
        "shape": [1, 32],
        "compression": "zstd",
    }
    source = lens(tmp_path / "v.json", [[0.0]], [1], activations=tensor)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(AFTError, match="needs the zstandard package"):
        import_vector(source, tmp_path / "v")

    class Decompressor:
        def decompress(self, data: bytes, max_output_size: int) -> bytes:
            assert max_output_size >= len(data)
            return data[::-1]

    fake = SimpleNamespace(ZstdDecompressor=Decompressor, ZstdError=ArithmeticError)
    monkeypatch.setitem(sys.modules, "zstandard", fake)
    folder, _ = import_vector(source, tmp_path / "v")
    assert torch.equal(SteeringVector.load(folder).layers[1], torch.from_numpy(values[0].copy()))


@pytest.mark.parametrize(
    ("values", "blocks", "changes", "match"),
    [
        (np.ones((1, 32)), [1], {"norm_match": True}, "has norm_match"),
        (np.ones((1, 3, 32)), [1], {}, "values for single positions"),
        (np.ones((1, 32)), [1], {"position_indices": [4]}, "values for single positions"),
        (np.ones((2, 32)), [1], {}, "lists blocks"),
        (np.ones((2, 32)), [1, 1], {}, "lists blocks"),
        (np.full((1, 32), np.nan), [1], {}, "NaN"),
        (np.ones((1, 32)), [-1], {}, "layer -1"),
        (np.ones((1, 32)), [1], {"scale": None}, "not a steering vector of vllm-lens"),
        (np.ones((1, 32)), [1], {"activations": {"data": "!"}}, "not a steering vector of vllm-lens"),
        (np.ones((1, 32)), [1], {"activations": None}, "not a steering vector of vllm-lens"),
    ],
)
def test_odd_files_of_vllm_lens(
    values: Any, blocks: list[int], changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    source = lens(tmp_path / "v.json", values, blocks, **changes)
    with pytest.raises(AFTError, match=match):
        import_vector(source, tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_other_json_is_refused(tmp_path: Path) -> None:
    """Such as EasySteer's settings, and its biases of expert routers."""
    (tmp_path / "moe.json").write_text('{"layers": {"3": {"bias": [0.1, 0.2]}}}')
    with pytest.raises(AFTError, match="not a steering vector of vllm-lens") as caught:
        import_vector(tmp_path / "moe.json", tmp_path / "v")
    assert "EasySteer" in caught.value.hint


# --- pickles: EasySteer's and steering-vectors' .pt, axbench, hotwire, pyreft


def test_pickled_tensors_come_with_the_way_to_convert_them(tmp_path: Path) -> None:
    torch.save(torch.ones(24, 32), tmp_path / "hotwire.pt")
    torch.save({"layer_activations": {3: torch.ones(32)}}, tmp_path / "steering_vectors.pt")
    for name in ("hotwire.pt", "steering_vectors.pt"):
        with pytest.raises(AFTError, match="is a pickle or a torch.save archive") as caught:
            import_vector(tmp_path / name, tmp_path / "v")
        assert "SteeringVector({LAYER: tensor}).save(FOLDER)" in caught.value.hint
    (tmp_path / "reft").mkdir()
    torch.save({"weight": torch.ones(1, 32)}, tmp_path / "reft" / "intkey_layer_8.bin")
    with pytest.raises(AFTError, match="has no adapter_config.json") as caught:
        import_vector(tmp_path / "reft", tmp_path / "v")
    assert "pickles" in caught.value.hint


def test_a_pointer_of_git_lfs_is_told(tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 173632\n"
    )
    with pytest.raises(AFTError, match="a pointer of Git LFS") as caught:
        import_vector(tmp_path / "v.gguf", tmp_path / "v")
    assert "git lfs pull" in caught.value.hint


def test_our_own_files_need_no_import(tmp_path: Path) -> None:
    file = SteeringVector({1: torch.ones(8)}).save(tmp_path / "v")
    for source in (file, file.parent):
        with pytest.raises(AFTError) as caught:
            import_vector(source, tmp_path / "w")
        assert "as it is" in caught.value.hint
    save_file({"steer": torch.ones(8)}, tmp_path / "other.safetensors")
    with pytest.raises(AFTError, match="but not a steering vector") as caught:
        import_vector(tmp_path / "other.safetensors", tmp_path / "w")
    assert "SteeringVector({LAYER: tensor})" in caught.value.hint


# --- PEFT


@pytest.mark.parametrize(("kind", "told"), [("IA3", "multiplies keys"), ("LN_TUNING", "norms")])
def test_adapters_that_add_nothing_say_why(kind: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(AFTError, match=f"holds a {kind} adapter; only constants.*{told}"):
        import_vector(tmp_path, tmp_path / "v")


def test_a_lora_that_trains_the_models_own_biases(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=1, target_modules=["dense_4h_to_h"], bias="lora_only", task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_model("gpt_neox"), config).save_pretrained(tmp_path / "adapter")
    held = load_file(tmp_path / "adapter/adapter_model.safetensors")
    saved = any(name.endswith(".bias") for name in held)  # PEFT 0.20 leaves them out of the file
    message = "not a constant that it adds" if saved else "has no bias"
    with pytest.raises(AFTError, match=message) as caught:
        import_vector(tmp_path / "adapter", tmp_path / "v", model=checkpoint("gpt_neox"))
    assert not saved or "lora_bias" in caught.value.hint


def test_lora_biases_of_several_blocks_with_their_scaling(
    checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    """What a LoRA adds is multiplied by lora_alpha / r."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["down_proj"], lora_bias=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny_model("llama"), config)
    biases = {}
    for n, block in enumerate(model.get_base_model().model.layers):
        biases[n] = torch.randn(32, generator=torch.Generator().manual_seed(n))
        block.mlp.down_proj.lora_B["default"].bias.data = biases[n].clone()
    model.save_pretrained(tmp_path / "adapter")
    folder, _ = import_vector(tmp_path / "adapter", tmp_path / "v", model=checkpoint("llama"))
    vector = SteeringVector.load(folder)
    assert list(vector.layers) == [0, 1, 2, 3]
    assert all(torch.allclose(vector.layers[n], 3 * biases[n]) for n in biases)
