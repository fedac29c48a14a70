"""One vector for several tasks: fair shares, no leaks between tasks, scores task by task."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lm_eval_aft import AFTError, train_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.engine.batching import make_batch
from lm_eval_aft.harness.examples import Example
from lm_eval_aft.harness.splits import MixedSplits, interleaved
from lm_eval_aft.library.entry import task_names
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.vector import describe_vector
from lm_eval_aft.studies.config import LibraryStudy, VectorEntry
from lm_eval_aft.training import checkpoint as events_module
from lm_eval_aft.training.objectives import LM, Choice, Mixture, Objective
from lm_eval_aft.training.recipe import TrainingPlan
from lm_eval_aft.training.selection import Score
from lm_eval_aft.training.setup import Prepared, apply_control, prepare
from tests.conftest import CHOICE_YAML, toy_documents
from tests.training.test_objectives import DOCS, logits_and_batch

SMALL = {"protocol": "maximum", "lr": 3e-2, "l2": 0.0, "retries": 0, "regression": False, "batch_size": 4}


@pytest.fixture
def lm(checkpoint: Callable[..., str]) -> AFTLM:
    return AFTLM(checkpoint("llama"), device="cpu", batch_size=4)


@pytest.fixture
def tasks(toy_tasks: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """toy_choice, toy_generate and, over documents of its own, toy_other: acc only, one shot, other words."""

    def make(
        train: list[dict[str, Any]] | None = None, test: list[dict[str, Any]] | None = None, shots: int = 1
    ) -> str:
        folder = Path(toy_tasks())
        parts = {
            "train": train or toy_documents(60, start=300),
            "test": test or toy_documents(20, start=500),
        }
        files = {}
        for split, documents in parts.items():
            path = folder / f"other-{split}.jsonl"
            path.write_text("".join(json.dumps(document) + "\n" for document in documents))
            files[split] = str(path)
        text = CHOICE_YAML.format(files=json.dumps(files)).replace("toy_choice", "toy_other")
        text = text.replace("Question :", "the tree :").partition("  - metric: acc_norm")[0]
        text += f"num_fewshot: {shots}\nmetadata:\n  version: 2.0\n"
        (folder / "toy_other.yaml").write_text(text)
        return str(folder)

    return make


def prepared(lm: AFTLM, folder: str, task: str = "toy_choice,toy_other", **settings: Any) -> Prepared:
    return prepare(lm, TrainingPlan.of(task, include_path=(folder,), **{**SMALL, **settings}))


def mixed(lm: AFTLM, folder: str, task: str = "toy_choice,toy_other", **settings: Any) -> MixedSplits:
    splits = prepared(lm, folder, task, **settings).splits
    assert isinstance(splits, MixedSplits)
    return splits


@dataclass(frozen=True)
class Item:
    task: int
    number: int


def test_interleaving_is_even_and_keeps_each_tasks_order() -> None:
    items = [Item(task, number) for task, size in ((0, 12), (1, 4), (2, 12)) for number in range(size)]
    random.Random(0).shuffle(items)
    found = interleaved(items)
    for task in range(3):
        assert [i for i in found if i.task == task] == [i for i in items if i.task == task]
    for start in range(0, 28, 7):  # every quarter holds a quarter of each task
        assert sorted(i.task for i in found[start : start + 7]) == [0, 0, 0, 1, 2, 2, 2]
    alone = [Item(0, number) for number in (3, 1, 2)]
    assert interleaved(alone) == alone


def test_losses_and_scores_are_each_tasks_own() -> None:
    objectives: list[Objective] = [Choice("acc"), Choice("acc_norm")]
    mixture = Mixture(objectives, ["a", "b"])
    logits, batch = logits_and_batch()
    documents = tuple(replace(document, task=i) for document, i in zip(DOCS, (0, 1, 1), strict=True))
    batch = replace(batch, documents=documents)
    each = [objective.losses(logits, batch) for objective in objectives]
    assert mixture.losses(logits, batch).tolist() == [float(each[0][0]), *each[1][1:].tolist()]
    outcomes = mixture.outcomes(logits, batch)
    score = mixture.summarise(outcomes[::-1])  # engines score the longest first
    own = [one.outcomes(logits, batch) for one in objectives]
    expected = [objectives[0].summarise(own[0][:1]), objectives[1].summarise(own[1][1:])]
    assert [score.tasks["a"], score.tasks["b"]] == [
        expected[0],
        replace(expected[1], stderr=pytest.approx(expected[1].stderr)),
    ]
    assert score.score == pytest.approx((expected[0].score + expected[1].score) / 2)
    assert score.accuracy == pytest.approx((expected[0].accuracy + expected[1].accuracy) / 2)
    assert score.n == 3
    assert score.stderr == pytest.approx(expected[1].stderr / 2)
    assert Score(**json.loads(json.dumps(score.to_dict()))) == score
    assert "tasks" not in expected[0].to_dict()


def test_one_tasks_confidence_cannot_win() -> None:
    """Each task has a temperature of its own: shouting on one of them changes nothing."""
    mixture = Mixture([Choice("acc"), Choice("acc")], ["a", "b"])
    logits, batch = logits_and_batch()
    plain = []
    for task in (0, 1):  # all documents, once as each task's
        own = replace(batch, documents=tuple(replace(document, task=task) for document in DOCS))
        plain += mixture.outcomes(logits, own)
    louder = [np.stack([o[0], 5 * o[1], o[2]]) if o[0, 0] == 1 else o for o in plain]
    assert mixture.summarise(louder).score == pytest.approx(mixture.summarise(plain).score, abs=1e-6)


def test_a_mixture_of_generation_tasks() -> None:
    docs = [replace(document, pairs=document.pairs[:1], task=i % 2) for i, document in enumerate(DOCS)]
    batch = make_batch(docs, False, torch.device("cpu"), torch.float32)
    logits = torch.randn(len(batch.scored), 10, generator=torch.Generator().manual_seed(2))
    mixture = Mixture([LM(), LM()], ["a", "b"])
    score = mixture.summarise(mixture.outcomes(logits, batch))
    alone = LM().summarise([LM().outcomes(logits, batch)[i] for i in (0, 2)])
    assert score.tasks["a"].to_dict() == pytest.approx(alone.to_dict())


def test_shares_are_even_and_each_task_keeps_its_own(lm: AFTLM, tasks: Callable[..., str]) -> None:
    ready = prepared(lm, tasks(), train_docs=21, selection_docs=16)
    splits = ready.splits
    assert isinstance(splits, MixedSplits)
    assert [(part.train_docs, len(part.selection)) for part in splits.parts] == [(11, 8), (10, 8)]
    assert [(part.num_fewshot, part.objective.metric) for part in ready.parts] == [
        (0, "acc_norm"),
        (1, "acc"),
    ]
    assert ready.objective.metric == "acc_norm, acc"
    assert [example.task for example in splits.selection] == [0, 1] * 8
    assert sorted(example.task for example in splits.train(0)[:10]) == [0] * 5 + [1] * 5
    for example in splits.train(0):
        context = example.requests[0][0]
        assert context.count("Question") == (example.task == 0)
        assert context.count("the tree :") == 2 * (example.task == 1)
    shown = ready.summary()
    assert shown["num_fewshot"] == "0, 1"
    assert shown["task toy_other"] == "10 train, 8 selection, 1-shot, acc"
    # Alone, a task is carved in the same way.
    alone = prepared(lm, tasks(), "toy_choice", train_docs=11, selection_docs=8).splits
    assert [e.doc_id for e in alone.selection] == [e.doc_id for e in splits.parts[0].selection]


def test_a_small_task_gives_what_it_has(
    lm: AFTLM, tasks: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        splits = mixed(
            lm, tasks(train=toy_documents(9, start=300), shots=0), train_docs=40, selection_docs=20
        )
    assert [(part.drawn, len(part.selection)) for part in splits.parts] == [(20, 10), (6, 3)]
    assert (
        "toy_other has only 6 training and 3 selection documents for its shares of 20 and 10" in caplog.text
    )
    assert "toy_choice has only" not in caplog.text
    with pytest.raises(AFTError, match="--train-docs 1 is less than one document for each of 2 tasks"):
        mixed(lm, tasks(), train_docs=1)


def test_nothing_leaks_from_one_task_into_another(lm: AFTLM, tasks: Callable[..., str]) -> None:
    """toy_other's evaluation and selection documents, in other words, lie in toy_choice's training split."""
    own, shared = toy_documents(60), toy_documents(30, start=40)
    folder = tasks(train=[*shared, *toy_documents(20, start=300)], test=own[:6], shots=2)
    splits = mixed(lm, folder, train_docs=80, selection_docs=16)
    counts = splits.parts[0].counts
    assert counts["evaluation_overlap"] == 6
    assert counts["other_selection"] > 0
    questions = [
        {example.requests[0][0].rsplit(":", 2)[1].split("?")[0].strip() for example in part}
        for part in ([e for e in splits.train(0) if e.task == 0], splits.parts[1].selection)
    ]
    forbidden = {document["question"] for document in own[:6]} | questions[1]
    assert len(questions[0]) > 20
    assert not questions[0] & forbidden
    for example in splits.train(0):
        if example.task == 1:  # its few-shot examples come from where toy_choice is selected on, too
            *shots, _ = example.requests[0][0].split("\n\n")
            mine = {
                e.requests[0][0].split(":", 1)[1].split("?")[0].strip() for e in splits.parts[0].selection
            }
            assert len(shots) == 2
            assert not {shot.split(":", 1)[1].split("?")[0].strip() for shot in shots} & mine


def test_tasks_of_different_types_are_refused(lm: AFTLM, tasks: Callable[..., str]) -> None:
    with pytest.raises(AFTError, match="toy_choice 'choice', toy_generate 'lm'"):
        prepared(lm, tasks(), "toy_choice,toy_generate")
    with pytest.raises(AFTError, match="name one twice, or none"):
        TrainingPlan.of(["toy_choice", "toy_choice"])


def test_controls_stay_within_their_task() -> None:
    examples = [Example(i, (("", f" {i}"),), (0,), (1.0,), task=i % 2) for i in range(12)]
    dealt = apply_control(examples, "format", 0)
    for example, other in zip(examples, dealt, strict=True):
        assert other.requests[0][1] != example.requests[0][1]
        assert int(other.requests[0][1]) % 2 == example.task == other.task


def test_from_training_to_evaluation(
    checkpoint: Callable[..., str], tasks: Callable[..., str], tmp_path: Path
) -> None:
    folder, out = tasks(), tmp_path / "v"
    words = ["train", "--model", checkpoint("llama"), "--task", "toy_choice", "--task", "toy_other"]
    words += ["--include-path", folder, "--output", str(out), "--layers", "1-2", "--seeds", "2"]
    words += ["--train-docs", "20", "--selection-docs", "20", "--protocol", "optimized", "--epochs", "2"]
    result = CliRunner().invoke(aft, [*words, "--dtype", "float32", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "--tasks toy_choice,toy_other" in result.output
    assert "toy_other: cross-entropy" in result.output
    from lm_eval_aft import load_vector

    vector = load_vector(out)
    meta = vector.metadata
    assert (meta["task"], meta["num_fewshot"], meta["metric"]) == (
        "toy_choice,toy_other",
        None,
        "acc_norm, acc",
    )
    assert task_names(meta) == ("toy_choice", "toy_other")
    details = [(each["num_fewshot"], each["metric"], each["splits"]["train"]) for each in meta["tasks"]]
    assert details == [(0, "acc_norm", 10), (1, "acc", 10)]
    for side in ("baseline", "vector"):
        own = meta["selection"][side]["tasks"]
        mean = sum(own[name]["score"] for name in ("toy_choice", "toy_other")) / 2
        assert meta["selection"][side]["score"] == pytest.approx(mean)
    assert describe_vector(vector)["tasks"] == [
        {"task": "toy_choice", "num_fewshot": 0},
        {"task": "toy_other", "num_fewshot": 1},
    ]
    card = (out / "README.md").read_text()
    assert "training splits of `toy_choice`, `toy_other`" in card
    assert "--tasks toy_choice,toy_other" in card
    words = ["eval", "--model", checkpoint("llama"), "--vector", str(out), "--tasks", "toy_choice,toy_other"]
    words += ["--output", str(tmp_path / "r"), "--", "--include_path", folder, "--num_fewshot", "1"]
    scored = CliRunner().invoke(aft, words)
    assert scored.exit_code == 0, scored.output
    notes = " ".join(scored.output.split())
    assert "trained on 0-shot prompts of toy_choice, scored 1-shot" in notes
    assert "prompts of toy_other" not in notes


def test_equal_mixtures_give_equal_vectors_and_each_task_counts(lm: AFTLM, tasks: Callable[..., str]) -> None:
    settings = {**SMALL, "include_path": (tasks(),), "layers": "1", "seeds": 1, "epochs": 1}
    settings |= {"train_docs": 12, "selection_docs": 12, "progress": False}
    one, two = (train_vector(lm, ["toy_choice", "toy_other"], **settings) for _ in range(2))
    assert one.vector.digest() == two.vector.digest()
    assert one.sweep.baseline.tasks.keys() == {"toy_choice", "toy_other"}
    alone = train_vector(lm, "toy_choice", **settings)
    assert "tasks" not in alone.vector.metadata
    assert alone.vector.digest() != one.vector.digest()


def test_a_study_scores_a_mixture_on_each_of_its_tasks() -> None:
    entry = VectorEntry(name="mix/both", task="toy_choice,toy_other")
    study = LibraryStudy(
        vectors={"mix/both": entry, "one/other": VectorEntry(name="one/other", task="toy_other")}
    )
    assert study.scored_tasks() == {"toy_choice": entry, "toy_other": entry}


def test_an_interrupted_mixture_resumes_to_the_same_vector(
    lm: AFTLM, tasks: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, "include_path": (tasks(),), "layers": "1-2", "seeds": 1, "epochs": 3}
    settings |= {"train_docs": 8, "selection_docs": 8, "progress": False}
    whole = train_vector(lm, ["toy_choice", "toy_other"], **settings)
    save, calls = events_module.save_state, []

    def dying(*arguments: Any) -> None:
        save(*arguments)
        calls.append(1)
        if len(calls) == 3:  # the empty state, and two epochs
            raise KeyboardInterrupt

    monkeypatch.setattr(events_module, "save_state", dying)
    with pytest.raises(KeyboardInterrupt):
        train_vector(lm, ["toy_choice", "toy_other"], tmp_path / "v", **settings)
    monkeypatch.setattr(events_module, "save_state", save)
    resumed = train_vector(lm, ["toy_choice", "toy_other"], tmp_path / "v", resume=True, **settings)
    assert resumed.vector.digest() == whole.vector.digest()
    assert resumed.vector.metadata["selection"] == whole.vector.metadata["selection"]
