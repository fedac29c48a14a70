"""What ``lm_eval --tasks`` takes is found, with lm-eval's metadata; a task's own errors are told as such."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.harness import tasks
from lm_eval_aft.harness.tasks import find_tasks, load_task, load_tasks

PLAIN = """\
task: {name}
tag: own_tag
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/data.jsonl, test: {folder}/data.jsonl}}}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: gold
"""
MADE = """\
task: own_made
custom_dataset: !function utils.sized
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: gold
"""
CODE = """\
import datasets

def sized(**metadata):
    if "pretrained" not in metadata:
        raise ValueError("need pretrained= in the metadata")
    rows = [{"q": f"Question {i}?", "choices": ["a", "b"], "gold": 0} for i in range(metadata.get("size", 6))]
    return {name: datasets.Dataset.from_list(rows) for name in ("train", "test")}
"""


def loaded(specs: Sequence[str], *args: Any) -> dict[str, Any]:
    found: dict[str, Any] = load_tasks(*find_tasks(specs, *args))["tasks"]
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two plain tasks, a group of them, and one made from metadata."""
    rows = [{"q": f"Question {i}?", "choices": ["yes", "no"], "gold": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("own_a", "own_b"):
        (tmp_path / f"{name}.yaml").write_text(PLAIN.format(name=name, folder=tmp_path))
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "own_group.yaml").write_text("group: own_both\ntask: [own_a, own_b]\n")
    (tmp_path / "utils.py").write_text(CODE)

    def index(include_path: Sequence[str | Path], metadata: dict[str, Any] | None = None) -> TaskManager:
        # Without lm-eval's own, which take ten seconds.
        return TaskManager(
            include_path=list(map(str, include_path)), include_defaults=False, metadata=metadata
        )

    monkeypatch.setattr(tasks, "full_index", index)
    return tmp_path


def test_all_that_lm_eval_takes_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    both = ["own_a", "own_b"]
    assert list(loaded(["own_b"], [folder])) == ["own_b"]
    assert list(loaded(["own_a,own_b"], [folder])) == both
    assert list(loaded(["own_?"], [folder])) == both
    assert list(loaded(["own_both"], [folder])) == both
    assert list(loaded(["own_tag"], [folder])) == both
    assert list(loaded([f"{folder}/own_a.yaml"])) == ["own_a"]
    assert list(loaded([f"{folder.name}/own_[ab].yaml"])) == both
    assert list(loaded([str(folder)], [folder])) == both
    assert list(loaded([folder.name], [folder])) == both
    assert list(loaded([str(folder / "groups" / "own_group.yaml")], [folder])) == both
    assert list(loaded([str(folder / "groups")], [folder])) == both
    manager, specs = find_tasks(["own_a", f"{folder}/own_b.yaml"], [folder])
    assert specs == ["own_a", f"{folder}/own_b.yaml"]
    assert list(manager.load(specs)["tasks"]) == both


def test_a_name_goes_before_a_folder_of_that_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own_a").mkdir()
    (folder / "own_a" / "other.yaml").write_text(PLAIN.format(name="other", folder=folder))
    monkeypatch.chdir(folder)
    assert list(loaded(["own_a"], [folder])) == ["own_a"]


def test_what_is_nothing_of_these_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for given, what in (
        ("own_x", "There is no harness task 'own_x'.\nNearest names: own_"),
        ("", "No task was named"),
        ("nope.yaml", "There is no task file nope.yaml"),
        ("zzz*", r"There is no harness task 'zzz\*'"),
        ("own_both,own_a", "A task is named twice: Duplicate task 'own_a'"),
        ("own_both", "stands for several tasks.\nChoose one of: own_a, own_b"),
    ):
        with pytest.raises(AFTError, match=what):
            load_task(given, [folder])
    (folder / "odd.yaml").write_text("task: [unclosed\n")
    with pytest.raises(AFTError, match=r"A task file of odd\.yaml cannot be read"):
        load_task("odd.yaml")


def test_tasks_get_lm_evals_metadata(folder: Path) -> None:
    (folder / "own_made.yaml").write_text(MADE)
    found = loaded(["own_made"], [folder], {"pretrained": "some/model", "size": 3})
    assert len(found["own_made"].dataset["train"]) == 3
    assert len(loaded([f"{folder}/own_made.yaml"], [], {"pretrained": "m"})["own_made"].dataset["test"]) == 6
    with pytest.raises(AFTError, match=r"code of task 'own_made' fails: ValueError: need pretrained= in the"):
        loaded(["own_made"], [folder])


def test_missing_data_is_told_apart_from_code_that_fails(folder: Path) -> None:
    text = PLAIN.format(name="gone", folder=folder / "no-such-folder")
    (folder / "gone.yaml").write_text(text)
    with pytest.raises(
        AFTError, match=r"The data of task 'gone' cannot be loaded: .*no-such-folder[\s\S]*network"
    ):
        load_task("gone", [folder])
    (folder / "broken.yaml").write_text(MADE.replace("own_made", "broken").replace("sized", "missing"))
    with pytest.raises(AFTError, match="'broken'"):
        load_task("broken", [folder])
