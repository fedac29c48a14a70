"""Bases that are more than a folder: with an adapter, from a GGUF file, in a subfolder, at a revision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from lm_eval_aft import AFTError, SteeringVector, train_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.export.formats import export_vector, import_vector
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.fingerprint import describe_base, fingerprint
from lm_eval_aft.steering.hooks import attach
from tests.conftest import tiny_model, tiny_tokenizer
from tests.support.gguf_files import llama_to_gguf

IDS = torch.arange(2, 30)[None]
OUTPUTS = {"merged": "out", "gguf": "out.gguf", "steered": "out.pt", "vllm-lens": "out.json"}


def vector_for(model: Any, tokenizer: Any, name: str, /, **args: Any) -> SteeringVector:
    """A vector whose metadata are as training writes them."""
    values = torch.randn(32, generator=torch.Generator().manual_seed(5))
    base = {"name": name, "revision": "main", **({"args": args} if args else {})}
    return SteeringVector(
        {2: values}, metadata={"base_model": base, "fingerprint": fingerprint(model, tokenizer)}
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA on the query projections of the tiny llama."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("lora")
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gguf_base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Arguments of a tiny llama in a GGUF file, in F32 and without a vocabulary."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    llama_to_gguf(tiny_model("llama"), folder / "m.gguf")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return {"pretrained": str(folder), "gguf_file": "m.gguf", "tokenizer": str(folder / "tokenizer")}


# --- PEFT


@pytest.mark.parametrize("kind", sorted(OUTPUTS))
def test_a_vector_for_a_base_with_an_adapter(
    kind: str, adapter: str, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    base = checkpoint("llama")
    lm = HFLM(pretrained=base, peft=adapter, device="cpu")
    vector = vector_for(lm.model, lm.tokenizer, base, peft=adapter)
    made = export_vector(vector, kind, tmp_path / OUTPUTS[kind])
    with torch.no_grad(), attach(lm.model, vector):
        wanted = lm.model(IDS).logits
    if kind == "merged":
        assert any(f"the adapter {adapter} was merged into the weights first" in note for note in made.notes)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert (merged(IDS).logits - wanted).abs().max() <= 1e-4
    elif kind == "steered":
        from lm_eval.models.hf_steered import SteeredModel

        stock: Any = SteeredModel(base, str(tmp_path / "out.pt"), device="cpu", peft=adapter)
        assert (stock._model_call(IDS) - wanted).abs().max() <= 1e-4
        assert any(f"peft={adapter}: give these to lm-eval" in note for note in made.notes)


def test_an_adapter_on_an_adapter_is_refused(
    adapter: str, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    lm = HFLM(pretrained=checkpoint("llama"), peft=adapter, device="cpu")
    vector = vector_for(lm.model, lm.tokenizer, checkpoint("llama"), peft=adapter)
    with pytest.raises(AFTError, match="lm-eval's peft= takes one") as caught:
        export_vector(vector, "peft", tmp_path / "out")
    assert "--to merged" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_the_message_tells_the_two_bases_apart(
    adapter: str, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    base = checkpoint("llama")
    lm = HFLM(pretrained=base, peft=adapter, device="cpu")
    recorded = vector_for(lm.model, lm.tokenizer, base, peft=adapter)
    with pytest.raises(AFTError) as caught:
        export_vector(recorded, "merged", tmp_path / "out", model=base)
    assert f"trained on {base!r} with peft={adapter!r}, not on {base!r}: " in caught.value.what
    # A vector of 0.1 does not record the adapter.
    with pytest.raises(AFTError, match="which was loaded otherwise or has changed since") as caught:
        export_vector(vector_for(lm.model, lm.tokenizer, base), "merged", tmp_path / "out")
    assert "peft=" in caught.value.hint
    plain = vector_for(tiny_model("llama"), tiny_tokenizer(), base)
    with pytest.raises(AFTError) as caught:
        attach(lm.model, plain)
    assert f"trained on {base!r}, not on {base!r} with a PEFT adapter: " in caught.value.what


def test_model_arguments_on_the_command_line(
    adapter: str, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    base = checkpoint("llama")
    lm = HFLM(pretrained=base, peft=adapter, device="cpu")
    vector_for(lm.model, lm.tokenizer, base).save(tmp_path / "v")
    asked = ["export", str(tmp_path / "v"), "--to", "gguf", "-o", str(tmp_path / "v.gguf")]
    result = CliRunner().invoke(aft, [*asked, "--model-args", f"peft={adapter}"])
    assert result.exit_code == 0, result.output
    back = ["import", str(tmp_path / "v.gguf"), "--model", base, "--model-args", f"peft={adapter}"]
    result = CliRunner().invoke(aft, [*back, "-o", str(tmp_path / "back")])
    assert result.exit_code == 0, result.output
    meta = SteeringVector.load(tmp_path / "back").metadata
    assert meta["base_model"]["args"] == {"peft": adapter}
    AFTLM(base, peft=adapter, vector=str(tmp_path / "back"), device="cpu")  # the fingerprint fits
    for wrong in ("peft=/nothing/there", "no_such_argument=1"):
        result = CliRunner().invoke(aft, [*asked[:-1], str(tmp_path / "w.gguf"), "--model-args", wrong])
        assert result.exit_code == 1
        assert result.output.strip().startswith("Error: ")


# --- GGUF


@pytest.mark.parametrize("kind", ["merged", "peft", "steered", "gguf"])
def test_a_vector_for_a_base_in_a_gguf_file(kind: str, gguf_base: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lm = HFLM(**gguf_base, device="cpu")
    name = gguf_base["pretrained"]
    given = {key: value for key, value in gguf_base.items() if key != "pretrained"}
    vector = vector_for(lm.model, lm.tokenizer, name, **given)
    made = export_vector(vector, kind, tmp_path / {**OUTPUTS, "peft": "out"}[kind])
    with torch.no_grad(), attach(lm.model, vector):
        wanted = lm.model(IDS).logits
    if kind == "merged":
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert (merged(IDS).logits - wanted).abs().max() <= 1e-4
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    elif kind == "peft":
        assert any("gguf_file=m.gguf" in note for note in made.notes)
        import peft

        again = peft.PeftModel.from_pretrained(HFLM(**gguf_base, device="cpu").model, str(tmp_path / "out"))
        assert (again(IDS).logits - wanted).abs().max() <= 1e-4


def test_a_gguf_base_has_weights_that_can_be_compared(gguf_base: dict[str, str]) -> None:
    model = HFLM(**gguf_base, device="cpu").model
    found = fingerprint(model, tiny_tokenizer())
    plain = fingerprint(tiny_model("llama"), tiny_tokenizer())
    assert not found["quantized"]
    assert found["sketch"] == plain["sketch"]


# --- subfolders and revisions


@pytest.mark.parametrize("kind", ["merged", "peft", "steered"])
def test_a_base_in_a_subfolder(kind: str, checkpoint: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    repository = tmp_path / "repository"
    shutil.copytree(checkpoint("llama"), repository / "small")
    (repository / "small" / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 7}')
    vector = vector_for(tiny_model("llama"), tiny_tokenizer(), str(repository), subfolder="small")
    target = tmp_path / ("out.pt" if kind == "steered" else "out")
    made = export_vector(vector, kind, target)
    assert made.agreement is not None
    if kind == "merged":
        assert json.loads((target / "generation_config.json").read_text())["top_k"] == 7
        assert "subfolder `small`" in (target / "README.md").read_text()
    else:
        assert any("subfolder=small: give these to lm-eval" in note for note in made.notes)
    other = vector_for(tiny_model("llama", seed=1), tiny_tokenizer(), str(repository), subfolder="large")
    with pytest.raises(AFTError) as caught:
        export_vector(
            other, kind, tmp_path / "w.pt", model=str(repository), model_args={"subfolder": "small"}
        )
    assert f"{str(repository)!r} with subfolder='large', not on" in caught.value.what
    assert "with subfolder='small': weights differ" in caught.value.what


def test_a_base_in_words() -> None:
    assert describe_base({"name": "m", "revision": "main"}) == "'m'"
    assert describe_base({"name": "m", "revision": "step3", "args": {"gguf_file": "a.gguf"}}) == (
        "'m' with revision='step3', gguf_file='a.gguf'"
    )
    assert describe_base({}) == "'an unnamed model'"


def test_only_arguments_that_name_the_weights_are_taken_from_a_file(
    checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    """A stranger's vector cannot ask for its model's own code to be run."""
    vector = vector_for(
        tiny_model("llama"), tiny_tokenizer(), checkpoint("llama"), trust_remote_code=True, dtype="float16"
    )
    made = export_vector(vector, "merged", tmp_path / "out")
    assert "dtype float32" in made.notes[0]


# --- a vocabulary that is not the tokenizer's


def test_an_adapter_tells_of_resized_embeddings(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    """The tiny model has 64 rows, its tokenizer 48 tokens: lm-eval's peft= cuts the rest."""
    pytest.importorskip("peft")
    base = checkpoint("llama")
    values = torch.randn(32, generator=torch.Generator().manual_seed(5))
    vector = SteeringVector({2: values})
    made = export_vector(vector, "peft", tmp_path / "out", model=base)
    (told,) = (note for note in made.notes if "resizes the embeddings" in note)
    assert "64 rows, to its tokenizer's 48 tokens" in told
    assert "rise by up to" in told
    assert told.partition(":")[0].lower() in (tmp_path / "out" / "README.md").read_text().lower()
    bound = float(told.partition("up to ")[2].split()[0])
    adapted = HFLM(pretrained=base, peft=str(tmp_path / "out"), device="cpu").model
    assert adapted.config.vocab_size == 48
    plain = AutoModelForCausalLM.from_pretrained(base)
    from lm_eval_aft.export.base import probe_prompts

    ids = probe_prompts(plain.config)[0].clamp(max=47)
    with torch.no_grad(), attach(plain, vector):
        rise = adapted(ids).logits.log_softmax(-1) - plain(ids).logits.log_softmax(-1)[..., :48]
    assert 0 < float(rise.max()) <= 2 * bound


def test_no_word_of_resizing_where_nothing_is_resized(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    values = torch.randn(32, generator=torch.Generator().manual_seed(5))
    made = export_vector(SteeringVector({2: values}), "peft", tmp_path / "out", model=str(tmp_path / "base"))
    assert not any("resizes" in note for note in made.notes)
    assert import_vector(tmp_path / "out", tmp_path / "back")[0].is_dir()


# --- from training to an export


@pytest.mark.parametrize("kind", ["peft", "gguf_file"])
def test_what_is_trained_with_model_arguments_is_exported_without_them(
    kind: str,
    adapter: str,
    gguf_base: dict[str, str],
    checkpoint: Callable[..., str],
    toy_tasks: Callable[..., str],
    tmp_path: Path,
) -> None:
    """The vector remembers how its base was loaded."""
    given = dict(gguf_base) if kind == "gguf_file" else {"pretrained": checkpoint("llama"), "peft": adapter}
    trained = train_vector(
        given.pop("pretrained"),
        "toy_choice",
        protocol="rapid",
        layers="1",
        lr=0.1,
        train_docs=20,
        epochs=1,
        progress=False,
        include_path=[toy_tasks()],
        model_args={**given, "device": "cpu", "dtype": "float32"},
    )
    made = export_vector(trained.vector, "merged", tmp_path / "out")
    assert made.agreement is not None
    told = "dtype float32" if kind == "gguf_file" else "was merged into the weights first"
    assert any(told in note for note in made.notes)
