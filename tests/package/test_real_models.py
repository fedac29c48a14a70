"""Pretrained models: stock's answers, exact gradients, and a vector that helps on held-out documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_aft import SteeringVector, attach, compare, evaluate_pair, train_vector
from lm_eval_aft.export.formats import export_vector
from lm_eval_aft.harness.examples import encode
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.fingerprint import tokenizer_facts
from lm_eval_aft.training.gradients import Gradients
from lm_eval_aft.training.recipe import TrainingPlan
from lm_eval_aft.training.setup import prepare
from lm_eval_aft.training.trainer import make_engine
from tests.engine.test_engine import nothing
from tests.training.test_onepass import by_autograd

SMALL, OTHERS = "smollm2-135m-instruct", ["gemma-3-270m", "qwen2.5-coder-0.5b-instruct"]
GGUF = "gguf/model.gguf"
BY_TIER = [
    pytest.param(SMALL, marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS),
]


@pytest.fixture(scope="module")
def loaded(real_model: Callable[[str], Path]) -> Iterator[Callable[[str], tuple[HFLM, AFTLM]]]:
    """Stock and our own model in float32; one pair is kept at a time."""
    kept: dict[str, tuple[HFLM, AFTLM]] = {}

    def get(name: str) -> tuple[HFLM, AFTLM]:
        if name not in kept:
            kept.clear()
            given: dict[str, Any] = {"dtype": "float32", "device": "cpu", "batch_size": 16}
            folder = str(real_model(name))
            kept[name] = HFLM(pretrained=folder, **given), AFTLM(folder, **given)
        return kept[name]

    yield get
    kept.clear()


def requests(task: str, limit: int, shots: int, chat: HFLM | None) -> list[Instance]:
    """The harness's own requests for a task's first documents, as ``lm_eval`` asks them."""
    from lm_eval.tasks import get_task_dict

    from lm_eval_aft.harness.tasks import task_manager_for

    (found,) = get_task_dict([task], task_manager_for([task], [])).values()
    found.set_config(key="num_fewshot", value=shots)
    found.set_fewshot_seed(1234)
    template: dict[str, Any] = {}
    if chat is not None:
        template = {"apply_chat_template": True, "fewshot_as_multiturn": True}
        template |= {"chat_template": chat.apply_chat_template, "tokenizer_name": chat.tokenizer_name}
    found.build_all_requests(limit=limit, rank=0, world_size=1, **template)
    return list(found.instances)


def check_answers(pair: tuple[HFLM, AFTLM], task: str, limit: int, chat: bool) -> None:
    """Every log-likelihood within 1e-4 of stock's, and the same greedy tokens."""
    stock, ours = pair
    ours.steer(None)
    asked = requests(task, limit, 0, stock if chat else None)
    assert len({each.doc_id for each in asked}) == limit
    expected = stock.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    largest = max(abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True))
    print(f"{task}, chat {chat}: {largest:.1e}, {ours.get_model_info()['aft']['scoring_path']}")
    assert largest <= 1e-4
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [BY_TIER[0], BY_TIER[2]])  # Gemma's is a base model: it goes on otherwise
def test_it_is_the_model_it_is_said_to_be(name: str, real_model: Callable[[str], Path], loaded: Any) -> None:
    stock, _ = loaded(name)
    folder = real_model(name)
    assert "Licence: " in (folder / "ORIGIN.md").read_text()
    ids = stock.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = stock.model(ids).logits[0, -1].argmax()
    assert stock.tokenizer.decode(best) == " Paris"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("task", "chat"),
    [
        pytest.param("arc_easy", False, marks=pytest.mark.slow),
        pytest.param("arc_easy", True, marks=pytest.mark.full),
        pytest.param("hellaswag", False, marks=pytest.mark.full),
        pytest.param("hellaswag", True, marks=pytest.mark.full),
    ],
)
def test_choices_have_stocks_answers(task: str, chat: bool, loaded: Any, test_data: Path) -> None:
    check_answers(loaded(SMALL), task, 100, chat)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chat", [False, True])
def test_texts_are_stocks(chat: bool, loaded: Any, test_data: Path) -> None:
    stock, ours = loaded(SMALL)
    ours.steer(None)
    asked = requests("gsm8k", 8, 5, stock if chat else None)
    found = ours.generate_until(asked, disable_tqdm=True)
    print(ours.get_model_info()["aft"]["scoring_path"])
    assert found == stock.generate_until(asked, disable_tqdm=True)
    assert any(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gradients_are_autograds(loaded: Any, test_data: Path) -> None:
    _, ours = loaded(SMALL)
    ours.steer(None)
    plan = TrainingPlan.of("arc_easy", protocol="onepass", train_docs=4, selection_docs=4)
    prepared = prepare(ours, plan)
    docs = encode(prepared.splits.selection, ours)
    backbone = find_backbone(ours.model)
    engine, path = make_engine(ours.model, backbone, prepared.objective, docs)
    assert path == "packed"
    found = Gradients(engine, docs, range(len(backbone.blocks)), ["all"]).run(nothing).mean("all")
    expected = by_autograd(ours.model, prepared.objective, docs, "all")
    for layer in (0, 14, 29):
        own = expected[layer]
        assert float((found[layer] - own).norm() / own.norm()) <= 1e-4, layer


@pytest.fixture(scope="module")
def vector(
    real_model: Callable[[str], Path], data_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Trained on 100 documents of arc_easy's training split, at a few layers."""
    folder = tmp_path_factory.mktemp("vector") / "v"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(data_root / "hub")
        train_vector(
            str(real_model(SMALL)), "arc_easy", folder,
            layers="10,14,18", train_docs=100, selection_docs=100, refine=2,
            progress=False, model_args={"device": "cpu"},
        )  # fmt: skip
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_vector_is_better_on_held_out_questions(
    vector: Path, real_model: Callable[[str], Path], test_data: Path, tmp_path: Path
) -> None:
    flags = ["--limit", "200", "--batch_size", "16"]
    evaluate_pair(
        str(real_model(SMALL)), str(vector), ["arc_easy"], tmp_path / "r",
        model_args={"device": "cpu", "dtype": "bfloat16"}, flags=flags,
    )  # fmt: skip
    (row,) = [row for row in compare(tmp_path / "r").rows if row.primary]
    print(row)
    assert row.n == 200
    assert row.verdict == "better"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_merged_export_is_the_steered_model(vector: Path, loaded: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trained = SteeringVector.load(vector)

    stock, _ = loaded(SMALL)
    made = export_vector(trained, "merged", tmp_path / "merged")
    assert made.agreement is not None
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    # The checkpoint is in bfloat16, and so is the bias that holds the vector.
    shifts = {
        layer: (trained.coefficient * values).bfloat16().float() for layer, values in trained.layers.items()
    }
    text = "Question: Which of these conducts electricity best?\nAnswer: copper wire, because"
    ids = stock.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = stock.model(ids).logits
        with attach(stock.model, SteeringVector(shifts)):
            steered = stock.model(ids).logits
        assert (steered - plain).abs().max() > 0.1
        assert (merged(ids).logits - steered).abs().max() <= 1e-3


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", BY_TIER)
def test_a_gguf_file_scores_as_its_folder(
    name: str, real_model: Callable[[str], Path], test_data: Path
) -> None:
    """Bit for bit, in the folder's own dtype: the file's weights rounded to bfloat16."""
    folder = real_model(name)
    given: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "fast": False, "batch_size": 8}
    answers, facts = [], []
    for model in (folder, folder / GGUF):
        lm = AFTLM(str(model), **given)
        facts.append(tokenizer_facts(lm.tokenizer))
        answers.append(lm.loglikelihood(requests("arc_easy", 20, 0, None), disable_tqdm=True))
        del lm
    assert answers[0] == answers[1]
    assert facts[0] == facts[1]


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("task", ["arc_easy", "hellaswag"])
@pytest.mark.parametrize("name", OTHERS)
def test_choices_of_the_larger_models(name: str, task: str, loaded: Any, test_data: Path) -> None:
    check_answers(loaded(name), task, 100, False)
