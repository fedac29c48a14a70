"""A GGUF file as the base model: trained on, scored, exported, and told from its kin."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import AddedToken

from lm_eval_aft import AFTError, SteeringVector, train_vector
from lm_eval_aft.cli.evaluate import evaluate
from lm_eval_aft.cli.main import aft
from lm_eval_aft.cli.options import parse_model_args
from lm_eval_aft.export.formats import export_vector
from lm_eval_aft.harness.commands import vector_command
from lm_eval_aft.harness.identity import model_identity
from lm_eval_aft.library.entry import identify
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.fingerprint import compare_fingerprints, fingerprint, tokenizer_facts
from tests.conftest import tiny_model, tiny_tokenizer
from tests.support.gguf_files import llama_to_gguf

pytest.importorskip("gguf")
SIZES: dict[str, Any] = {
    "train_docs": 8,
    "selection_docs": 8,
    "layers": "1",
    "protocol": "rapid",
    "epochs": 1,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tiny llama in GGUF files of three formats, with its tokenizer beside them."""
    folder = tmp_path_factory.mktemp("gguf")
    tiny_tokenizer().save_pretrained(folder)
    model = tiny_model("llama")
    return {
        kind: str(llama_to_gguf(model, folder / f"m.{kind}.gguf", kind)) for kind in ("F32", "Q8_0", "Q4_0")
    }


def test_the_weights_are_dequantised_once_and_it_is_told(
    files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lm_eval_aft"):
        lm = AFTLM(files["Q4_0"], device="cpu")
    size = sum(parameter.nbytes for parameter in lm.model.parameters()) / 1e6
    told = (
        f"m.Q4_0.gguf was dequantised: its weights take {size:.0f} MB in float32; dtype=bfloat16 takes half"
    )
    assert [told in message for message in caplog.messages].count(True) == 1
    assert all(parameter.is_floating_point() for parameter in lm.model.parameters())
    folder, name = str(Path(files["Q4_0"]).parent), Path(files["Q4_0"]).name
    assert (lm.pretrained, lm.model_args["gguf_file"]) == (folder, name)
    apart = AFTLM(folder, gguf_file=name, device="cpu")
    for key, tensor in lm.model.state_dict().items():
        assert torch.equal(tensor, apart.model.state_dict()[key])
    assert lm.tokenizer.chat_template == tiny_tokenizer().chat_template


def test_weights_that_stay_quantised_are_refused(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers has kernels for them it would leave them so, if it were not asked to unpack them."""
    create, asked = HFLM._create_model, []

    def packed(self: Any, **given: Any) -> None:
        create(self, **given)
        asked.append(given["quantization_config"])
        blocks = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        self._model.model.layers[0].mlp.register_parameter("blocks", blocks)

    monkeypatch.setattr(HFLM, "_create_model", packed)
    with pytest.raises(AFTError, match="m.Q8_0.gguf were left in their quantised blocks"):
        AFTLM(files["Q8_0"], device="cpu")
    assert [getattr(each, "dequantize", None) for each in asked] == (
        [True] if hasattr(transformers, "GgufConfig") else [None]
    )


def test_from_training_to_an_export(
    files: dict[str, str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    """The file's path is all that any command needs, and what they print leads back to it."""
    tasks, file = toy_tasks(), files["Q8_0"]
    words = ["train", "--model", file, "--task", "toy_choice", "--include-path", tasks, "--device", "cpu"]
    for key, value in SIZES.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    result = CliRunner().invoke(aft, [*words, "--output", str(tmp_path / "v")])
    assert result.exit_code == 0, result.output
    vector = SteeringVector.load(tmp_path / "v")
    base = vector.metadata["base_model"]
    assert (base["name"], base["args"]["gguf_file"]) == (str(Path(file).parent), "m.Q8_0.gguf")
    printed = next(line.strip() for line in result.output.splitlines() if line.startswith("  aft eval"))
    given = evaluate.make_context("eval", shlex.split(printed)[2:]).params
    assert given["model"] == base["name"]
    assert parse_model_args(given["model_args"])["gguf_file"] == "m.Q8_0.gguf"
    flags = ["--include_path", tasks, "--limit", "4"]
    words = ["eval", "--model", file, "--vector", str(tmp_path / "v"), "--tasks", "toy_choice"]
    result = CliRunner().invoke(
        aft, [*words, "--output", str(tmp_path / "r"), "--device", "cpu", "--", *flags]
    )
    assert result.exit_code == 0, result.output
    (results,) = (tmp_path / "r" / "baseline").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["model_args"]["gguf_file"] == "m.Q8_0.gguf"
    for model in (None, file):
        made = export_vector(vector, "gguf", tmp_path / f"{model is None}.gguf", model=model)
        assert any(f"it is for {file}" in note for note in made.notes)


def test_a_command_for_a_file_reads_back() -> None:
    meta = {"base_model": {"name": "my models", "args": {"gguf_file": "a, b.gguf"}}, "task": "arc_easy"}
    options = evaluate.make_context("eval", shlex.split(vector_command(meta, "v", "out"))[2:]).params
    assert options["model"] == "my models"
    assert parse_model_args(options["model_args"]) == {"gguf_file": "a, b.gguf"}


def test_quantisations_are_told_apart_as_kin(
    files: dict[str, str], toy_tasks: Callable[..., str], checkpoint: Callable[..., str]
) -> None:
    result = train_vector(
        files["Q8_0"],
        "toy_choice",
        include_path=[toy_tasks()],
        progress=False,
        model_args={"device": "cpu"},
        **SIZES,
    )
    vector = result.vector
    AFTLM(files["Q8_0"], vector=vector, device="cpu", dtype="bfloat16")
    for other, percent in ((files["Q4_0"], (2, 15)), (checkpoint("llama"), (0, 2))):
        with pytest.raises(AFTError, match="weights differ. The two are kin: their weights are") as caught:
            AFTLM(other, vector=vector, device="cpu")
        share = float(caught.value.what.rpartition("weights are ")[2].partition("%")[0])
        assert percent[0] < share < percent[1]
    with pytest.raises(AFTError) as caught:
        AFTLM(checkpoint("llama", 1), vector=vector, device="cpu")
    assert "weights differ" in caught.value.what
    assert "kin" not in caught.value.what


def test_a_files_numbers_are_those_of_the_config(files: dict[str, str]) -> None:
    """GGUF files hold single precision: 1e-05 becomes 9.99e-06, and 10000 a float."""
    original = tiny_model("llama")
    original.config.rms_norm_eps = 1e-5
    original.config.rope_parameters["rope_theta"] = 10000
    folder = Path(files["F32"]).parent
    read = AFTLM(str(llama_to_gguf(original, folder / "same.gguf")), device="cpu").model
    assert read.config.rms_norm_eps != 1e-5
    values = {1: torch.ones(32)}
    for trained, used in ((original, read), (read, original)):
        vector = SteeringVector(values, metadata={"fingerprint": fingerprint(trained)})
        AFTLM(used, vector=vector, tokenizer=tiny_tokenizer(), device="cpu")
    read.config.rms_norm_eps = 2e-5
    with pytest.raises(AFTError, match="settings of the computation"):
        AFTLM(read, vector=vector, tokenizer=tiny_tokenizer(), device="cpu")


def test_another_tokenizer_of_the_same_vocabulary_is_told(
    files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    lm = AFTLM(files["F32"], device="cpu")
    original = tiny_tokenizer()
    original.eos_token = "<pad>"
    original.chat_template = "other"
    facts = {"begins": "<eos>", **tokenizer_facts(original)} | {"begins": "<eos>"}
    meta = {"fingerprint": fingerprint(lm.model, lm.tokenizer), "base_model": {"name": "o"}}
    lm.steer(SteeringVector({1: torch.ones(32)}, metadata={**meta, "tokenizer": facts}))
    (told,) = [message for message in caplog.messages if "tokenizer differs" in message]
    assert told == (
        "The tokenizer differs from that of 'o': this one begins texts with nothing (there <eos>), ends them "
        "with <eos> (there <pad>), has another chat template."
    )
    caplog.clear()
    lm.steer(
        SteeringVector({1: torch.ones(32)}, metadata={**meta, "tokenizer": tokenizer_facts(lm.tokenizer)})
    )
    assert not caplog.messages
    caplog.clear()
    # A file's tokenizer may lack what the original adds: a word that is never split, a chat template.
    lm.tokenizer.chat_template = None
    original = tiny_tokenizer()
    original.add_tokens([AddedToken("cat", normalized=False)])
    assert original.get_vocab() == lm.tokenizer.get_vocab()
    lm.steer(SteeringVector({1: torch.ones(32)}, metadata={**meta, "tokenizer": tokenizer_facts(original)}))
    (told,) = [message for message in caplog.messages if "tokenizer differs" in message]
    assert told.endswith(": this one has other added tokens, has no chat template.")


def test_libraries_and_studies_know_files(files: dict[str, str]) -> None:
    lm = AFTLM(files["Q4_0"], device="cpu")
    whole = fingerprint(lm.model, lm.tokenizer)
    for weights in (True, False):
        found = identify(files["Q4_0"], weights=weights)
        assert (found.hidden_size, found.num_hidden_layers) == (32, 4)
        assert compare_fingerprints(whole, found.fingerprint) == []
    assert model_identity(files["Q4_0"], {}) != model_identity(files["Q8_0"], {})
