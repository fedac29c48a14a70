"""Exports and imports: what they write, what they refuse, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_aft import AFTError, SteeringVector, load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.export import merged
from lm_eval_aft.export.base import Export, ExportJob
from lm_eval_aft.export.formats import FORMATS, Format, export_vector, import_vector, register_format
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.fingerprint import fingerprint
from lm_eval_aft.steering.hooks import attach
from tests.conftest import tiny_model, tiny_tokenizer

OUTPUTS = {"merged": "out", "peft": "out", "gguf": "out.gguf", "steered": "out.pt", "vllm-lens": "out.json"}


def some_vector(*layers: int, coefficient: float = 0.7, **metadata: Any) -> SteeringVector:
    generator = torch.Generator().manual_seed(5)
    return SteeringVector(
        {n: torch.randn(32, generator=generator) for n in layers or (2,)}, coefficient, metadata=metadata
    )


def call(*arguments: str) -> Result:
    return CliRunner().invoke(aft, list(arguments))


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(params=sorted(OUTPUTS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- what is written


def test_a_merged_folder_is_complete(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint("qwen2"), base)
    # transformers reads this, and refuses to save it.
    (base / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": false, "eos_token_id": 0}'
    )
    vector = some_vector(task="toy")
    export_vector(vector, "merged", tmp_path / "deep" / "er" / "merged", model=str(base))
    target = tmp_path / "deep" / "er" / "merged"
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= everything(target)
    assert (target / "generation_config.json").read_text() == (base / "generation_config.json").read_text()
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, target))
    assert after.chat_template == before.chat_template is not None
    assert after.get_vocab() == before.get_vocab()
    text = "Question : the cat sees one red bird ?"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    card = (target / "README.md").read_text()
    assert vector.digest() in card
    assert "Rewritten from qwen2 to llama" in card
    assert everything(target.parent) == {"merged", *(f"merged/{name}" for name in everything(target))}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_as_they_are(tied: bool, tmp_path: Path) -> None:
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    model.save_pretrained(tmp_path / "base")  # without a tokenizer, too
    export_vector(some_vector(1), "merged", tmp_path / "merged", model=str(tmp_path / "base"))
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tied)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] == tied


def test_large_checkpoints_are_written_in_shards(
    checkpoint: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "SHARD_SIZE", "50KB")
    made = export_vector(some_vector(), "merged", tmp_path / "merged", model=checkpoint("llama"))
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    assert made.agreement is not None
    assert made.agreement.difference <= 1e-5


def test_a_second_vector_goes_into_a_merged_checkpoint(
    checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    """Two vectors one after the other equal both at once, also where the first rewrote the family."""
    one, two = some_vector(1), some_vector(2, coefficient=0.4)
    export_vector(one, "merged", tmp_path / "first", model=checkpoint("qwen3"))
    made = export_vector(two, "merged", tmp_path / "second", model=str(tmp_path / "first"))
    assert made.notes[0].startswith("the vector was added to mlp.down_proj.bias")
    ids = torch.arange(2, 32)[None]
    base, export = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (checkpoint("qwen3"), tmp_path / "second")
    )
    with torch.no_grad(), attach(base, one), attach(base, two):
        assert float((base(ids).logits - export(ids).logits).abs().max()) <= 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads memory from /proc")
def test_memory_is_bounded() -> None:
    """24 blocks of Qwen2-0.5B's shape: at most 1.3 times the checkpoint, the export's check included."""
    script = Path(__file__).parents[2] / "scripts" / "bench_export.py"
    shown = subprocess.run([sys.executable, script, "memory"], capture_output=True, text=True, check=True)
    result = json.loads(shown.stdout.splitlines()[-1])
    assert result["memory"]["peak_over_checkpoint"] <= 1.3
    assert result["memory"]["difference"] <= result["memory"]["bound"]


def test_gguf_reads_back_and_returns_exactly(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    vector = some_vector(1, 3, coefficient=0.3)
    export_vector(vector, "gguf", tmp_path / "v.gguf", model=checkpoint("gpt_neox"))
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "gptneox"
    assert fields["controlvector.layer_count"] == 2
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.3"]
    assert {t.tensor_type.name for t in reader.tensors} == {"F32"}
    assert [list(t.shape) for t in reader.tensors] == [[32], [32]]
    for tensor, values in zip(reader.tensors, vector.layers.values(), strict=True):
        assert np.array_equal(tensor.data, (values * 0.3).numpy())

    result = call("import", str(tmp_path / "v.gguf"), "-o", str(tmp_path / "back"))
    assert result.exit_code == 0, result.output
    back = load_vector(tmp_path / "back")
    assert back.coefficient == 1
    assert back.layers.keys() == vector.layers.keys()
    assert all(torch.equal(back.layers[n], vector.layers[n] * 0.3) for n in (1, 3))
    # With a model the vector is checked against it, and carries its fingerprint from then on.
    import_vector(tmp_path / "v.gguf", tmp_path / "named", model=checkpoint("gpt_neox"))
    assert load_vector(tmp_path / "named").metadata["fingerprint"]["sketch"]
    export_vector(load_vector(tmp_path / "named"), "gguf", tmp_path / "again.gguf")
    first, again = (gguf.GGUFReader(tmp_path / name).tensors for name in ("v.gguf", "again.gguf"))
    assert [(t.name, t.data.tobytes()) for t in again] == [(t.name, t.data.tobytes()) for t in first]


def test_peft_returns_exactly(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for family in ("gpt2", "llama"):
        vector = some_vector(0, 2)
        folder = tmp_path / f"{family}-adapter"
        export_vector(vector, "peft", folder, model=checkpoint(family))
        result = call("import", str(folder), "-o", str(tmp_path / family))
        assert result.exit_code == 0, result.output
        back = load_vector(tmp_path / family)
        assert all(torch.equal(back.layers[n], vector.layers[n] * 0.7) for n in (0, 2))
        assert back.metadata["base_model"]["name"] == checkpoint(family)
        AFTLM(checkpoint(family), vector=back, device="cpu")  # the fingerprint fits


def test_granites_multiplier_survives_a_round_trip(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    vector = some_vector(1)
    export_vector(vector, "peft", tmp_path / "adapter", model=checkpoint("granite"))
    (stored,) = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert torch.equal(stored.reshape(-1), vector.layers[1] * 0.7 / 0.5)
    import_vector(tmp_path / "adapter", tmp_path / "back", model=checkpoint("granite"))
    assert torch.equal(load_vector(tmp_path / "back").layers[1], vector.layers[1] * 0.7)


@pytest.mark.parametrize("kind", ["merged", "steered"])
def test_command(kind: str, checkpoint: Callable[..., str], tmp_path: Path) -> None:
    some_vector().save(tmp_path / "v")
    result = call(
        *("export", str(tmp_path / "v"), "--model", checkpoint("llama"), "--to", kind),
        *("--coefficient", "2", "-o", str(tmp_path / OUTPUTS[kind])),
    )
    assert result.exit_code == 0, result.output
    assert "Verified: logits differ by at most" in result.output
    assert f"Wrote {tmp_path / OUTPUTS[kind]}" in result.output
    if kind == "merged":
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(stored["model.layers.2.mlp.down_proj.bias"], some_vector().layers[2] * 2)
    else:
        (entry,) = torch.load(tmp_path / "out.pt", weights_only=True).values()
        assert torch.equal(entry["steering_vector"], some_vector().layers[2] * 2)


# --- what is refused


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Path]:
    """A folder that must be as empty after the test as before it."""
    folder = tmp_path / "left"
    folder.mkdir()
    yield folder
    assert everything(folder) == set()


def refused(kind: str, folder: Path, vector: SteeringVector, model: str, match: str) -> AFTError:
    with pytest.raises(AFTError, match=match) as caught:
        export_vector(vector, kind, folder / OUTPUTS[kind], model=model)
    assert caught.value.hint
    return caught.value


def test_dynamic_and_masked_vectors(kind: str, checkpoint: Callable[..., str], left: Path) -> None:
    dynamic, masked = some_vector(), some_vector()
    dynamic.method, masked.positions = "drab", "prompt"
    scaling = replace(some_vector(), method="scale")
    model = checkpoint("llama")
    refused(kind, left, dynamic, model, "method 'drab' cannot be exported: what it adds depends on")
    refused(kind, left, scaling, model, "method 'scale' cannot be exported: what it adds depends on")
    refused(kind, left, masked, model, "positions 'prompt' cannot be exported")
    refused(kind, left, some_vector(coefficient=0), model, "coefficient is 0")


def test_the_wrong_base_model(kind: str, checkpoint: Callable[..., str], left: Path) -> None:
    other = fingerprint(tiny_model("llama", seed=1), tiny_tokenizer())
    vector = some_vector(fingerprint=other, base_model={"name": "another"})
    refused(kind, left, vector, checkpoint("llama"), "trained on 'another', not on .*: weights differ")
    refused(kind, left, some_vector(9), checkpoint("llama"), "Layer 9 is out of range")
    narrow = SteeringVector({1: torch.ones(8)})
    refused(kind, left, narrow, checkpoint("llama"), "hidden size 8, the model 32")


def test_a_mismatch_may_be_allowed(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    other = fingerprint(tiny_model("llama", seed=1), tiny_tokenizer())
    export_vector(
        some_vector(fingerprint=other),
        "merged",
        tmp_path / "out",
        model=checkpoint("llama"),
        allow_mismatch=True,
    )
    assert (tmp_path / "out").is_dir()


def test_an_existing_output_is_left_alone(kind: str, checkpoint: Callable[..., str], tmp_path: Path) -> None:
    target = tmp_path / OUTPUTS[kind]
    target.write_text("mine")
    refused(kind, tmp_path, some_vector(), checkpoint("llama"), "exists already")
    assert target.read_text() == "mine"
    assert everything(tmp_path) == {OUTPUTS[kind]}


def test_an_unwritable_place(kind: str, checkpoint: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(kind, tmp_path / "file" / "sub", some_vector(), checkpoint("llama"), "Cannot write .*: Not a dir")
    assert everything(tmp_path) == {"file"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_disk_that_fills_up(kind: str, checkpoint: Callable[..., str], left: Path) -> None:
    """No file may grow beyond 64 bytes: a write fails half-way, as on a full disk."""
    model = checkpoint("llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        refused(kind, left / "new", some_vector(), model, "Cannot write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_too_little_room_is_seen_beforehand(
    checkpoint: Callable[..., str], left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused("merged", left / "new", some_vector(), checkpoint("llama"), "has 0.0 GB free")


@pytest.mark.parametrize("fault", ["wrong", "interrupted"])
def test_a_failing_export_is_deleted(
    fault: str, checkpoint: Callable[..., str], left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merged._reloaded_logits

    def faulty(folder: Path, prompts: Any) -> Any:
        assert (folder / "model.safetensors").is_file()
        if fault == "interrupted":
            raise KeyboardInterrupt
        return [logits + 1e-3 for logits in real(folder, prompts)]

    monkeypatch.setattr(merged, "_reloaded_logits", faulty)
    if fault == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            export_vector(some_vector(), "merged", left / "a" / "out", model=checkpoint("llama"))
    else:
        refused("merged", left, some_vector(), checkpoint("llama"), "deleted: it does not compute")


def test_a_vector_too_small_to_verify(checkpoint: Callable[..., str], left: Path) -> None:
    refused("merged", left, some_vector(coefficient=1e-9), checkpoint("llama"), "too little to verify")


def test_a_vector_that_overflows(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float16).save_pretrained(tmp_path / "base")
    huge = some_vector(coefficient=1e6)
    refused("merged", tmp_path, huge, str(tmp_path / "base"), "overflows torch.float16")
    assert not (tmp_path / "out").exists()


def test_layer_0_has_no_control_vector(left: Path) -> None:
    error = refused("gguf", left, some_vector(0, 2), "no-such-model", "cannot act after block 0")
    assert "--to merged" in error.hint


def test_missing_packages(
    checkpoint: Callable[..., str], left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, kind in (("gguf", "gguf"), ("peft", "peft")):
        monkeypatch.setitem(sys.modules, package, None)
        error = refused(kind, left, some_vector(), checkpoint("llama"), f"need the {package} package")
        assert f"lm-eval-aft[{package}]" in error.hint


def test_odd_arguments(left: Path) -> None:
    with pytest.raises(AFTError, match="should be a .gguf file"):
        export_vector(some_vector(), "gguf", left / "v", model="x")
    with pytest.raises(AFTError, match="no export 'onnx'"):
        export_vector(some_vector(), "onnx", left / "v", model="x")
    with pytest.raises(AFTError, match="does not say which model"):
        export_vector(some_vector(), "merged", left / "v")
    with pytest.raises(AFTError, match="cannot be loaded"):
        export_vector(some_vector(), "merged", left / "v", model=str(left / "nothing"))


def test_commands_refuse_in_one_message(checkpoint: Callable[..., str], left: Path, tmp_path: Path) -> None:
    some_vector().save(tmp_path / "v")
    asked = ("export", str(tmp_path / "v"), "--model", checkpoint("gemma2"), "-o", str(left / "out"))
    for result in (
        call(*asked, "--to", "merged"),
        call("import", str(tmp_path / "v"), "-o", str(left / "o")),
    ):
        assert result.exit_code == 1
        assert result.output.count("Error:") == 1
        assert "Traceback" not in result.output


# --- what cannot be imported


def write_gguf(path: Path, tensors: dict[str, np.ndarray[Any, Any]], architecture: str) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("tensors", "architecture", "match"),
    [
        ({"direction.-1": np.ones(8, np.float32)}, "controlvector", "'direction.-1'"),
        ({"direction.1": np.ones(8, np.float16)}, "controlvector", "as F16"),
        ({"direction.1": np.ones((2, 8), np.float32)}, "controlvector", "of 2 axes"),
        ({"direction.x": np.ones(8, np.float32)}, "controlvector", "'direction.x'"),
        (
            {"direction.1": np.ones(8, np.float32), "direction.2": np.ones(4, np.float32)},
            "controlvector",
            "has shape",
        ),
        ({"direction.1": np.full(8, np.nan, np.float32)}, "controlvector", "NaN"),
        ({"direction.1": np.ones(8, np.float32)}, "llama", "not a control vector"),
        ({}, "controlvector", "no directions"),
    ],
)
def test_odd_control_vectors(
    tensors: dict[str, Any], architecture: str, match: str, left: Path, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "v.gguf", tensors, architecture)
    with pytest.raises(AFTError, match=match):
        import_vector(source, left / "v")


def test_damaged_and_pickled_sources(left: Path, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "v.gguf", {"direction.1": np.ones(64, np.float32)}, "controlvector")
    content = whole.read_bytes()
    for cut in (5, 24, 40, 100, len(content) - 200):
        (tmp_path / "cut.gguf").write_bytes(content[:cut])
        with pytest.raises(AFTError, match="cannot be read as GGUF"):
            import_vector(tmp_path / "cut.gguf", left / "v")
    torch.save({"a": 1}, tmp_path / "v.pt")
    (tmp_path / "notes.txt").write_text("hello")
    for name, match in (("v.pt", "pickle"), ("notes.txt", "not a GGUF"), ("none", "nothing at")):
        with pytest.raises(AFTError, match=match):
            import_vector(tmp_path / name, left / "v")


def test_adapters_that_are_no_vectors(checkpoint: Callable[..., str], left: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    export_vector(some_vector(), "peft", adapter, model=checkpoint("llama"))
    config = json.loads((adapter / "adapter_config.json").read_text())

    def broken(match: str, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> None:
        folder = tmp_path / "broken"
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        if tensors is not None:
            save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(AFTError, match=match):
            import_vector(folder, left / "v")
        shutil.rmtree(folder)

    place = "base_model.model.model.layers.1"
    broken("holds a IA3 adapter", peft_type="IA3")
    broken("which is not a constant", {f"{place}.mlp.down_proj.ia3_l": torch.ones(32)})
    broken("does not move the output", {f"{place}.self_attn.o_proj.beft_bias": torch.ones(1, 32)})
    broken("in no block", {"base_model.model.lm_head.beft_bias": torch.ones(1, 64)})
    lora = {
        f"{place}.mlp.down_proj.lora_A.weight": torch.ones(1, 64),
        f"{place}.mlp.down_proj.lora_B.weight": torch.ones(32, 1),
    }
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    broken("has no bias", lora, **settings)
    lora[f"{place}.mlp.down_proj.lora_B.bias"] = torch.ones(32)
    broken("depends on the input", lora, **settings)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(AFTError, match=r"has no adapter_model\.safetensors") as caught:
        import_vector(adapter, left / "v")
    assert "pickles" in caught.value.hint


# --- adding a format


def test_a_format_is_added_by_one_decorated_class(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    """Written, checked, imported again, and listed wherever formats are."""

    @register_format
    class Numpy(Format):
        name, summary, description = "numpy", "numpy's", "an .npz file"
        suffixes, imported = (".npz",), "an .npz file"

        def write(self, job: ExportJob) -> Export:
            arrays: dict[str, Any] = {str(layer): shift.numpy() for layer, shift in job.shifts.items()}
            np.savez(job.target, **arrays)
            return Export(job.target, self.name, None, ["written as arrays"])

        def recognises(self, source: Path) -> bool:
            return source.suffix == ".npz"

        def read(self, source: Path, *_: Any) -> tuple[SteeringVector, list[str]]:
            with np.load(source) as arrays:
                layers = {int(name): torch.from_numpy(arrays[name]) for name in arrays.files}
            return SteeringVector(layers), []

    try:
        vector = some_vector(control="random")
        with pytest.raises(AFTError, match=r"should be a \.npz file"):
            export_vector(vector, "numpy", tmp_path / "v", model=checkpoint("llama"))
        made = export_vector(vector, "numpy", tmp_path / "v.npz", model=checkpoint("llama"))
        assert made.notes[0] == "written as arrays"
        assert "placebo" in made.notes[1]
        import_vector(made.path, tmp_path / "back")
        assert torch.equal(SteeringVector.load(tmp_path / "back").layers[2], vector.layers[2] * 0.7)
        with pytest.raises(AFTError, match="no export 'onnx'") as caught:
            export_vector(vector, "onnx", tmp_path / "v")
        assert "numpy" in caught.value.hint
        with pytest.raises(AFTError, match="nothing at") as caught:
            import_vector(tmp_path / "none", tmp_path / "back2")
        assert "an .npz file" in caught.value.hint
    finally:
        del FORMATS["numpy"]


def test_the_help_of_export_needs_no_torch() -> None:
    code = "import lm_eval_aft.export.formats, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = call("export", "--help").output
    for each in FORMATS.values():
        assert f"{each.name}: {each.summary}." in " ".join(shown.split())
        assert each.description.splitlines()[0] in shown
