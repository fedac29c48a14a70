"""The demo tasks hold what the demo claims of them: sound prompts, exact scoring, nothing leaked."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("aft_demo_choice", "aft_demo_math")
SHIPPED_SEED, SHIPPED_DOCUMENTS = 0, 100_000


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both tasks, built from a working directory that has nothing to do with the data files."""
    manager_module = pytest.importorskip("lm_eval.tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        manager = manager_module.TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False)
        return dict(manager.load(list(TASKS))["tasks"])


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    return load_script("demo_corpus")


def instances(task: Any) -> list[Any]:
    """Requests for every evaluation document, freshly built."""
    task.build_all_requests(limit=None, rank=0, world_size=1, cache_requests=False)
    return list(task.instances)


def mean_scores(task: Any, answer: Any) -> dict[tuple[str, str], float]:
    """Metrics of ``task`` by (metric, filter) when ``answer(instance)`` replies to each request."""
    requests = instances(task)
    for request in requests:
        request.resps = [answer(request)]
    task.apply_filters()
    by_doc: dict[int, list[Any]] = {}
    for request in requests:
        by_doc.setdefault(request.doc_id, []).append(request)
    values: dict[tuple[str, str], list[float]] = {}
    for name in requests[0].filtered_resps:
        for group in by_doc.values():
            group.sort(key=lambda request: request.idx)
            scores = task.process_results(group[0].doc, [request.filtered_resps[name] for request in group])
            for metric, value in scores.items():
                values.setdefault((metric, name), []).append(float(value))
    return {key: sum(found) / len(found) for key, found in values.items()}


@pytest.mark.parametrize("name", TASKS)
def test_every_evaluation_document_yields_requests(tasks: dict[str, Any], name: str) -> None:
    task = tasks[name]
    docs = list(task.test_docs())
    assert len(docs) >= 1000
    assert len(task.training_docs()) >= 2500
    requests = instances(task)
    assert {request.doc_id for request in requests} == set(range(len(docs)))
    assert len(requests) == len(docs) * (4 if name == "aft_demo_choice" else 1)


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_and_without_duplicates(tasks: dict[str, Any], name: str) -> None:
    test = [doc["question"] for doc in tasks[name].test_docs()]
    train = [doc["question"] for doc in tasks[name].training_docs()]
    assert len(set(test)) == len(test)
    assert len(set(train)) == len(train)
    assert not set(test) & set(train)


def test_prompts_read_as_a_person_would_write_them(tasks: dict[str, Any], corpus: ModuleType) -> None:
    marks = [mark for lines in corpus.MARKS.values() for mark in lines]
    for name in TASKS:
        for request in instances(tasks[name]):
            context = request.args[0]
            assert re.fullmatch(r"Question: [^\n]*[?.]\nAnswer:", context), context
            assert not any(mark in context for mark in marks)
            if name == "aft_demo_choice":
                assert re.fullmatch(r" [A-Za-z]+", request.args[1])
    for doc in tasks["aft_demo_choice"].test_docs():
        assert len(set(doc["options"])) == 4


def test_gold_answers_score_all_and_random_ones_chance(tasks: dict[str, Any]) -> None:
    rng = random.Random(1)
    choice, math = tasks["aft_demo_choice"], tasks["aft_demo_math"]
    gold = mean_scores(choice, lambda r: (0.0 if r.idx == r.doc["answer"] else -50.0, False))
    assert gold[("acc", "none")] == gold[("acc_norm", "none")] == 1.0
    chance = mean_scores(choice, lambda r: (-rng.random(), False))
    assert 0.20 < chance[("acc", "none")] < 0.30
    assert 0.20 < chance[("acc_norm", "none")] < 0.30
    gold = mean_scores(math, lambda r: " " + r.doc["answer"])
    assert gold[("exact_match", "strict-match")] == gold[("exact_match", "flexible-extract")] == 1.0
    chance = mean_scores(math, lambda r: f" #### {rng.randint(24, 178)}")
    assert chance[("exact_match", "strict-match")] < 0.05


def test_data_files_are_what_the_generator_writes(corpus: ModuleType) -> None:
    world = corpus.World(SHIPPED_SEED)
    for file in sorted((ROOT / "tasks" / "aft_demo").glob("*.jsonl")):
        assert file.stat().st_size < 1_500_000
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        task, _, split = file.stem.rpartition("_")
        assert rows == corpus.task_docs(world, task, split, len(rows), SHIPPED_SEED)


def test_no_task_document_occurs_in_the_corpus(tasks: dict[str, Any], corpus: ModuleType) -> None:
    def digest(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    world = corpus.World(SHIPPED_SEED)
    seen: set[bytes] = set()
    pairs: set[tuple[int, ...]] = set()
    for text, problems in corpus.documents(world, SHIPPED_DOCUMENTS, SHIPPED_SEED):
        assert all(problem.prompt in text for problem in problems)
        seen.update(digest(problem.question) for problem in problems)
        pairs.update(summands(problem.question) for problem in problems if problem.kind == "sum")
    assert len(seen) > 10_000
    for name in TASKS:
        for doc in [*tasks[name].test_docs(), *tasks[name].training_docs()]:
            assert digest(doc["question"]) not in seen
            if doc["kind"] == "sum":
                assert summands(doc["question"]) not in pairs


def summands(question: str) -> tuple[int, ...]:
    """The two numbers of a sum, in order of size."""
    return tuple(sorted(int(number) for number in re.findall(r"\d+", question)))
