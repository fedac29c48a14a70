"""`aft eval --tasks` takes what `lm_eval --tasks` takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from lm_eval_aft import AFTError
from lm_eval_aft.evaluation.results import read_run
from lm_eval_aft.evaluation.run import evaluate_pair
from lm_eval_aft.harness import tasks as harness_tasks
from lm_eval_aft.harness.tasks import find_tasks, load_tasks
from tests.conftest import toy_documents

TASK = """\
task: {name}
tag: x_tag
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} ?"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
META = """\
task: x_meta
custom_dataset: !function utils.sized
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} ?"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
UTILS = """\
from datasets import Dataset, DatasetDict


def sized(size, pretrained=None, **_):
    documents = [{"question": "cat", "choices": ["a", "b"], "gold": i % 2} for i in range(size)]
    return DatasetDict({"test": Dataset.from_list(documents)})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks x_pa, x_pb (tag x_tag), x_meta and the group x_group of the first two; no index of thousands."""
    tasks = tmp_path / "mine"
    tasks.mkdir()
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in toy_documents(6)))
    for name in ("x_pa", "x_pb"):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, file=data))
    (tasks / "x_meta.yaml").write_text(META)
    (tasks / "utils.py").write_text(UTILS)
    group = (
        "group: x_group\ntask: [x_pa, x_pb]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (tasks / "groups").mkdir()
    (tasks / "groups" / "x_group.yaml").write_text(group)

    def small(include_path: list[str], metadata: object = None) -> TaskManager:
        return TaskManager(include_path=list(include_path), include_defaults=False, metadata=metadata)

    monkeypatch.setattr(harness_tasks, "full_index", small)
    monkeypatch.chdir(tmp_path)
    return tasks


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["x_pa"], ["x_pa"]),
        (["x_pb,x_pa", "x_pb"], ["x_pb", "x_pa"]),
        (["x_p*"], ["x_pa", "x_pb"]),
        (["x_pa", "x_p*"], ["x_pa", "x_pb"]),
        (["x_tag"], ["x_pa", "x_pb"]),
        (["x_group"], ["x_pa", "x_pb"]),
        (["mine/x_pb.yaml"], ["x_pb"]),
        (["mine/x_p*.yaml"], ["x_pa", "x_pb"]),
        (["mine/groups/x_group.yaml"], ["x_pa", "x_pb"]),
        (["mine/x_pb.yaml", "x_pa"], ["x_pb", "x_pa"]),
        (["mine"], ["x_meta", "x_pa", "x_pb"]),
    ],
)
def test_names(folder: Path, given: list[str], names: list[str]) -> None:
    manager, found = find_tasks(given, ["mine"], {"size": 4})
    loaded = load_tasks(manager, found)
    assert list(loaded["tasks"]) == names
    assert list(loaded["groups"]) == (["x_group"] if "x_group" in given[0] else [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["x_pz"], "no harness task 'x_pz'"),
        (["q_*"], "no harness task 'q_\\*'"),
        (["mine/none.yaml"], "no task file mine/none.yaml"),
        ([" , "], "No task was named"),
        (["x_pa", "x_group"], "named twice"),
    ],
)
def test_what_is_no_task(folder: Path, given: list[str], message: str) -> None:
    with pytest.raises(AFTError, match=message):
        load_tasks(*find_tasks(given, ["mine"]))


def test_a_damaged_file(folder: Path) -> None:
    (folder / "x_bad.yaml").write_text("task: [")
    with pytest.raises(AFTError, match=r"x_bad.yaml cannot be read"):
        find_tasks(["mine/x_bad.yaml"])


def test_scored_under_their_names(folder: Path, checkpoint: Callable[..., str], tmp_path: Path) -> None:
    """A pattern, a file and a task made from metadata, and a group with its score."""
    import torch

    from lm_eval_aft import SteeringVector

    vector = tmp_path / "v.safetensors"
    SteeringVector({2: torch.ones(32)}).save(vector)
    arguments = {"device": "cpu"}
    flags = ["--include_path", "mine", "--metadata", '{"size": 5}']
    tasks = ["x_pb*", "mine/x_meta.yaml"]
    evaluate_pair(checkpoint("llama"), str(vector), tasks, tmp_path / "a", model_args=arguments, flags=flags)
    run = read_run(tmp_path / "a" / "steered" / "v")
    sizes = {name: len(task.samples["none"]) for name, task in run.tasks.items()}
    assert sizes == {"x_meta": 5, "x_pb": 6}
    evaluate_pair(
        checkpoint("llama"), str(vector), ["x_group"], tmp_path / "b", model_args=arguments, flags=flags
    )
    run = read_run(tmp_path / "b" / "baseline")
    assert list(run.tasks) == ["x_pa", "x_pb"]
    assert "x_group" in run.any["groups"]
