"""Training where tasks, models and machines are awkward: no leak, no wrong gradient, no false header."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lm_eval_aft import AFTError, SteeringVector, train_vector
from lm_eval_aft.engine import precision
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.harness.examples import Extractor, PromptSettings, encode
from lm_eval_aft.harness.splits import Splits, split_task
from lm_eval_aft.harness.tasks import load_task
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.training.candidate import Candidate, Recipe
from lm_eval_aft.training.objectives import Choice
from lm_eval_aft.training.recipe import TrainingPlan
from lm_eval_aft.training.run import run, run_sweep
from lm_eval_aft.training.setup import prepare
from lm_eval_aft.training.trainer import Reference, Trajectory, make_engine
from tests.conftest import tiny_model, tiny_tokenizer, toy_documents

CHOICE = "doc_to_target: gold\ndoc_to_choice: choices\noutput_type: multiple_choice\n"
TEXT = (
    "doc_to_target: answer\noutput_type: generate_until\n"
    'generation_kwargs: {until: ["Q :"], do_sample: false, max_gen_toks: 8}\n'
)


PLAN: dict[str, Any] = {
    "protocol": "rapid", "layers": "1", "epochs": 2, "train_docs": 20, "selection_docs": 10, "batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def a_task(folder: Path, yaml: str, **splits: list[dict[str, Any]]) -> list[str]:
    """A task `own` whose splits default to 60 and 20 toy documents."""
    folder.mkdir(exist_ok=True)
    files = {}
    for split, documents in {
        "train": toy_documents(60), "test": toy_documents(20, start=200), **splits
    }.items():  # fmt: skip
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(each) + "\n" for each in documents))
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(files)}}}\n"
        f"training_split: train\ntest_split: test\n{yaml}"
    )
    return [str(folder)]


def split(checkpoint: str, include: list[str], shots: int | None = None, **sizes: Any) -> Splits:
    lm = AFTLM(checkpoint, device="cpu", batch_size=4)
    extractor = Extractor(load_task("own", include), lm, PromptSettings(num_fewshot=shots))
    return split_task(extractor, sizes.pop("train", 20), sizes.pop("selection", 10), **sizes)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_a_converted_model_has_the_rotary_tables_of_one_loaded_so(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "hardware_has_bf16", lambda _device: True)
    monkeypatch.setattr(precision, "WORTHWHILE", 0)
    tiny_model(family).save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded, converted = (load(tmp_path, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert precision.to_training_dtype(converted) == torch.bfloat16
    expected = dict(loaded.named_buffers())
    assert any("inv_freq" in name for name in expected)
    for name, buffer in converted.named_buffers():
        assert torch.equal(buffer, expected[name]), name
        assert buffer.dtype == expected[name].dtype, name
    ids = torch.randint(5, 60, (2, 100), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(ids).logits, converted(ids).logits)


@pytest.mark.parametrize("method", ["gguf", "fp8"])
def test_weights_that_were_dequantised_train_in_the_fastest_dtype(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF file's weights are plain ones once read, whatever transformers keeps of its quantisation."""
    monkeypatch.setattr(precision, "hardware_has_bf16", lambda _device: True)
    monkeypatch.setattr(precision, "WORTHWHILE", 0)
    model: Any = tiny_model("llama")
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    model.config.quantization_config = model.hf_quantizer.quantization_config
    assert precision.to_training_dtype(model) == (torch.bfloat16 if method == "gguf" else torch.float32)


@pytest.mark.parametrize("kind", [CHOICE, TEXT])
@pytest.mark.parametrize("source", ["train", "test"])
def test_examples_with_text_of_their_own_leak_nothing(
    checkpoint: str, tmp_path: Path, kind: str, source: str
) -> None:
    yaml = (
        f'{kind}fewshot_split: {source}\ndoc_to_text: "Question : {{{{question}}}} ? think . Answer :"\n'
        'fewshot_config:\n  doc_to_text: "Question : {{question}} ? Answer :"\n'
    )
    splits = split(checkpoint, a_task(tmp_path / "t", yaml), shots=5)
    hidden = {each.doc["question"] for each in splits.selection}
    hidden |= {each["question"] for each in toy_documents(20, start=200)}
    for example in (*splits.train(0), *splits.selection):
        shown = example.requests[0][0].split("\n\n")[:-1]
        assert len(shown) == 5
        told = {text.split("Question : ")[1].split(" ?")[0] for text in shown}
        assert example.doc["question"] not in told
        assert not told & hidden


SAMPLES = (
    'num_fewshot: 2\ndoc_to_text: "Q : {{question}} ?\\nA :"\n'
    'doc_to_target: "{{answer if answer is defined else target}}"\n'
    f"{TEXT.partition(chr(10))[2]}"
    "fewshot_config:\n  sampler: first_n\n  samples:\n"
    '    - {question: "SAMPLE one", target: "one"}\n    - {question: "SAMPLE two", target: "two"}\n'
)


def test_just_enough_fixed_examples_are_the_ones_shown(checkpoint: str, tmp_path: Path) -> None:
    splits = split(checkpoint, a_task(tmp_path / "t", SAMPLES))
    prompts = [each.requests[0][0] for each in (*splits.train(0), *splits.selection)]
    scored = splits.extractor.requests(toy_documents(1, start=200)[0])[0][0]
    head = scored.split("Q : ")[:3]
    assert "SAMPLE one" in head[1]
    assert all(prompt.split("Q : ")[:3] == head for prompt in prompts)


def test_a_development_split_of_just_enough(
    checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    yaml = f'{CHOICE}fewshot_split: dev\ndoc_to_text: "Question : {{{{question}}}} ? Answer :"\n'
    dev = toy_documents(3, start=100)
    include = a_task(tmp_path / "t", yaml, dev=dev, train=[dev[1], *toy_documents(60)])
    splits = split(checkpoint, include, shots=3, train=50, selection=5)
    examples = [*splits.train(0), *splits.selection]
    assert not [each for each in examples if each.doc["question"] == dev[1]["question"]]
    for example in examples:
        assert all(f"Question : {each['question']} ?" in example.requests[0][0] for each in dev)
    # Three are too few for four: training documents stand in for them, and the log says so.
    splits = split(checkpoint, include, shots=4, train=20, selection=5)
    assert "shows examples from the training documents instead" in caplog.text
    assert all(each.requests[0][0].count("Question : ") == 5 for each in splits.train(0))


def test_repeats_with_options_in_another_order_are_repeats(checkpoint: str, tmp_path: Path) -> None:
    def turned(document: dict[str, Any]) -> dict[str, Any]:
        options = [*document["choices"], "of course"]
        return {**document, "choices": options[::-1], "golds": [0, 1]}

    straight = [
        {
            **each,
            "choices": [*each["choices"], "of course"],
            "golds": [len(each["choices"]) - 1, len(each["choices"])],
        }
        for each in toy_documents(30)
    ]
    yaml = (
        "doc_to_target: golds\ndoc_to_choice: choices\noutput_type: multiple_choice\n"
        'doc_to_text: "Question : {{question}} ?"\n'
    )
    include = a_task(tmp_path / "t", yaml, train=[*straight, *map(turned, toy_documents(30))])
    assert split(checkpoint, include, train=10, selection=10).counts["duplicates"] == 30


def test_gold_answers_as_numpy_counts_them(checkpoint: str, tmp_path: Path) -> None:
    yaml = f'{CHOICE}doc_to_text: "Question : {{{{question}}}} ?"\n'
    lm = AFTLM(checkpoint, device="cpu", batch_size=4)
    task = load_task("own", a_task(tmp_path / "t", yaml))
    extractor = Extractor(task, lm, PromptSettings())
    document = toy_documents(1)[0]
    expected = extractor.example(document, 0)
    task.doc_to_target = lambda doc: np.int64(doc["gold"])
    assert expected is not None
    assert extractor.example(document, 0) == expected


def test_a_long_training_document_decides_about_packing_too(checkpoint: str, tmp_path: Path) -> None:
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "mistral"
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    long = toy_documents(60)
    long[7]["question"] = " ".join(["the cat sees"] * 20)
    yaml = f'{CHOICE}doc_to_text: "{{{{question}}}}"\n'
    result = train_vector(
        str(folder), "own", None, include_path=a_task(tmp_path / "t", yaml, train=long), progress=False,
        model_args={"device": "cpu"}, **{**PLAN, "epochs": 1, "train_docs": 50},
    )  # fmt: skip
    assert result.engine == "unpacked"


def test_resuming_with_other_documents_is_refused(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = f'{CHOICE}doc_to_text: "Question : {{{{question}}}} ?"\n'
    include = a_task(tmp_path / "t", yaml)

    def train(output: str, **settings: Any) -> Any:
        arguments = {"device": "cpu", **settings.pop("model_args", {})}
        return train_vector(
            checkpoint, "own", tmp_path / output, include_path=include, progress=False, model_args=arguments,
            **PLAN, **settings,
        )  # fmt: skip

    original = Trajectory.train
    calls = []

    def dying(self: Trajectory, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(Trajectory, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        train("run")
    monkeypatch.setattr(Trajectory, "train", original)
    with pytest.raises(AFTError, match="documents differ"):
        train("run", resume=True, model_args={"max_length": 12})
    a_task(tmp_path / "t", yaml.replace("Question", "Asked"))
    with pytest.raises(AFTError, match="documents differ"):
        train("run", resume=True)
    a_task(tmp_path / "t", yaml)
    assert train("run", resume=True).vector.digest() == train("whole").vector.digest()


def scored_as_saved(prepared: Any, vector: SteeringVector) -> float:
    selection = encode(prepared.splits.selection, prepared.lm)
    engine = Reference(prepared.lm.model, prepared.backbone, prepared.objective)
    own = {name: tensor.clone() for name, tensor in vector.tensors.items()}
    used = Intervention(METHODS[vector.method], own, vector.coefficient, vector.positions)
    return engine.evaluate([Candidate(1, 0, Recipe(), used)], selection, lambda _: None)[0].score


@pytest.mark.parametrize(
    "change", [{}, {"norm_cap": 0.02}, {"calibrate": True}, {"control": "random"}], ids=str
)
def test_the_headers_score_is_the_saved_vectors_own(change: dict[str, Any]) -> None:
    lm = AFTLM("demo", device="cpu", batch_size=8)
    settings = {**PLAN, "lr": 1e-2, "train_docs": 40, "selection_docs": 40, **change}
    prepared = prepare(lm, TrainingPlan.of("aft_demo_choice", **settings))
    vector = run(prepared, None, progress=False).vector
    said = vector.metadata["selection"]
    assert said["vector"]["score"] == pytest.approx(scored_as_saved(prepared, vector), abs=1e-5)
    assert ("trained" in said) == bool(change)
    if change:
        assert said["trained"]["score"] != said["vector"]["score"]


def test_a_norm_cap_holds_for_every_seed(checkpoint: str, tmp_path: Path) -> None:
    include = a_task(tmp_path / "t", f'{CHOICE}doc_to_text: "Question : {{{{question}}}} ?"\n')
    lm = AFTLM(checkpoint, device="cpu", batch_size=4)
    settings = {**PLAN, "lr": 1e-1, "seeds": 3, "norm_cap": 0.01, "include_path": include}
    prepared = prepare(lm, TrainingPlan.of("own", **settings))
    result = run_sweep(prepared, None, progress=False)
    lengths = {seed: vector.norm() for seed, vector in result.finalists.items()}
    reached = {seed: lengths[seed] * v.coefficient for seed, v in result.finalists.items()}
    assert len({round(length, 4) for length in lengths.values()}) == 3
    assert max(reached.values()) == pytest.approx(min(reached.values()), rel=1e-5)
    for vector in result.finalists.values():
        assert vector.share() * vector.coefficient == pytest.approx(0.01, rel=1e-3)


def test_what_is_not_trained_can_be_planned() -> None:
    from click.testing import CliRunner

    from lm_eval_aft.cli.train import train_vector as command

    words = [
        "--model",
        "demo",
        "--task",
        "aft_demo_choice",
        "--method",
        "caa",
        "--protocol",
        "rapid",
        "--dry-run",
    ]
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "MiB above the loaded weights" in result.output


def random_document(length: int, draw: random.Random) -> TokenizedDocument:
    context = tuple(draw.randrange(5, 60) for _ in range(length))
    options = tuple((context, tuple(draw.randrange(5, 60) for _ in range(2))) for _ in range(4))
    return TokenizedDocument(options, (draw.randrange(4),), (1.0,) * 4)


def test_out_of_memory_while_a_batch_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    draw = random.Random(0)
    documents = [random_document(10, draw) for _ in range(6)]
    engine, _ = make_engine(model, find_backbone(model), Choice("acc"), documents)
    assert isinstance(engine, Trajectory)
    candidate = Candidate(1, 0, Recipe(), Intervention.static(1, torch.zeros(32)))
    expected = engine.evaluate([candidate], documents, lambda _: None)
    import lm_eval_aft.training.trainer as module

    made, limit, whole = [], [2], module.make_batch

    def scarce(chosen: Any, *args: Any) -> Any:
        made.append(len(chosen))
        if len(chosen) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(chosen, *args)

    monkeypatch.setattr(module, "make_batch", scarce)
    for most in (2, 1):
        limit[0] = most
        engine.budget = 4096
        found = engine.evaluate([candidate], documents, lambda _: None)
        assert found[0].score == pytest.approx(expected[0].score, abs=1e-6)
        assert made[0] == 6
        made.clear()
    limit[0] = 0
    with pytest.raises(AFTError, match="Out of memory on a single document"):
        engine.evaluate([candidate], documents, lambda _: None)


def test_no_training_document_that_can_be_used(checkpoint: str, tmp_path: Path) -> None:
    lm = AFTLM(checkpoint, device="cpu", batch_size=4)
    include = a_task(tmp_path / "t", f'{CHOICE}doc_to_text: "Question : {{{{question}}}} ?"\n')
    prepared = prepare(lm, TrainingPlan.of("own", **PLAN, include_path=include))
    prepared.splits.pool.clear()
    with pytest.raises(AFTError, match="No training document of seed 0 has a usable gold answer"):
        run(prepared, None, progress=False)
