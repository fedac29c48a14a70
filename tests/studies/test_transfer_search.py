"""`aft transfer` and `aft search` on a tiny random model: what they write, and that they go on."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonlines
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from lm_eval_aft import SteeringVector, load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.evaluation.stats import holm
from lm_eval_aft.studies import search as search_module
from lm_eval_aft.studies import train_set
from lm_eval_aft.studies.search import Point
from lm_eval_aft.training import run
from tests.studies.test_bench import SIZED

TRAINING = "--train-docs 12 --selection-docs 10 --device cpu".split()
SHORT = [
    *TRAINING,
    *"--protocol maximum --layers 1,2 --epochs 1 --seeds 1 --retries 0 --batch-size 4".split(),
]


def call(*words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(aft, list(words))
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def tasks(toy_tasks: Callable[..., str]) -> str:
    return toy_tasks()


def test_transfer_trains_scores_and_goes_on(
    tmp_path: Path, tasks: str, checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    words = [
        "transfer",
        "--model",
        checkpoint(),
        "--tasks",
        "toy_choice,toy_generate",
        "--output",
        str(output),
    ]
    words += [*SHORT, "--include-path", tasks, "--placebo", "random:1", "--", "--batch_size", "8"]
    first = call(*words).output
    assert "Transfer:" in first
    assert (output / "transfer.png").stat().st_size > 10_000
    found = json.loads((output / "transfer.json").read_text())
    cells = [cell for cell in found["cells"] if not cell["placebo"]]
    assert {(c["vector"], c["task"]) for c in cells} == {
        (a, b) for a in ("toy_choice", "toy_generate") for b in ("toy_choice", "toy_generate")
    }
    assert all(cell["own"] == (cell["vector"] == cell["task"]) for cell in cells)
    assert found["family"] == 4
    assert [c["p_adjusted"] for c in cells] == pytest.approx(holm([c["p"] for c in cells]))
    placebos = [cell for cell in found["cells"] if cell["placebo"]]
    assert len(placebos) == 4
    assert all(cell["p_adjusted"] is None for cell in placebos)
    rows = list(csv.DictReader((output / "transfer.csv").open()))
    assert [float(row["difference"]) for row in rows] == [cell["difference"] for cell in found["cells"]]
    assert "| toy_choice | " in (output / "transfer.md").read_text()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("this was done before")

    monkeypatch.setattr(run, "run_sweep", never)
    monkeypatch.setattr(train_set, "evaluate_pair", never)
    assert "already scored" in call(*words).output
    assert json.loads((output / "transfer.json").read_text()) == found
    other = [word if word != "12" else "8" for word in words]
    assert "other settings (train_docs)" in call(*other, code=1).output


def test_transfer_of_given_vectors(tmp_path: Path, tasks: str, checkpoint: Callable[..., str]) -> None:
    vector = tmp_path / "v"
    words = ["train", "--model", checkpoint(), "--task", "toy_choice", "--output", str(vector), *SHORT]
    call(*words, "--include-path", tasks)
    words = ["transfer", "--model", checkpoint(), "--tasks", "toy_choice", "--include-path", tasks]
    words += ["--device", "cpu", "--output", str(tmp_path / "out")]
    assert "Cannot read --vector" in call(*words, "--vector", "nothing", code=1).output
    call(*words, "--vector", f"mine={vector}")
    (cell,) = json.loads((tmp_path / "out" / "transfer.json").read_text())["cells"]
    assert (cell["vector"], cell["task"], cell["own"]) == ("mine", "toy_choice", True)
    assert not (tmp_path / "out" / "vectors").exists()


def test_transfer_to_tasks_without_a_score_per_document(
    tmp_path: Path, tasks: str, checkpoint: Callable[..., str]
) -> None:
    """They are left out of the matrix and told; where nothing is left, that is the error."""
    data = {"test": f"{tasks}/test.jsonl"}
    rolling = {"task": "toy_roll", "dataset_path": "json", "dataset_kwargs": {"data_files": data}}
    rolling |= {"output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": ""}
    rolling |= {"doc_to_target": "cat dog red", "metric_list": [{"metric": "word_perplexity"}]}
    Path(tasks, "toy_roll.yaml").write_text(yaml.safe_dump(rolling))
    SteeringVector({1: torch.ones(32)}).save(tmp_path / "v")
    words = ["transfer", "--model", checkpoint(), "--include-path", tasks, "--device", "cpu"]
    words += ["--vector", f"mine={tmp_path / 'v'}"]
    output = call(*words, "--tasks", "toy_roll,toy_choice", "--output", str(tmp_path / "both")).output
    assert "toy_roll: its metrics have no score per document" in output
    (cell,) = json.loads((tmp_path / "both" / "transfer.json").read_text())["cells"]
    assert cell["task"] == "toy_choice"
    refused = call(*words, "--tasks", "toy_roll", "--output", str(tmp_path / "alone"), code=1).output
    assert "No task has scores that can be compared" in refused
    listed = call("report", str(tmp_path / "alone" / "scores" / "toy_roll")).output
    assert "word_perplexity" in listed


def searched(output: Path) -> list[dict[str, Any]]:
    with jsonlines.open(output / "search.jsonl") as reader:
        return list(reader)


def test_grid_search_tries_everything_in_one_sweep(
    tmp_path: Path, tasks: str, checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    words = ["search", "--model", checkpoint(), "--task", "toy_choice", "--output", str(output), *TRAINING]
    words += ["--include-path", tasks, "--layers", "0%,50%,100%", "--lr", "1e-3,1e-2", "--epochs", "1,3"]
    words += ["--l2", "0,0.1", "--batch-size", "4"]
    said = call(*words).output
    points = searched(output)
    assert {(p["layer"], p["lr"], p["l2"], p["epochs"]) for p in points} == {
        (layer, lr, l2, epochs)
        for layer in (0, 2, 3) for lr in (1e-3, 1e-2) for l2 in (0.0, 0.1) for epochs in (1, 3)
    }  # fmt: skip
    best = min(points, key=lambda p: (p["score"], -p["accuracy"], p["epochs"]))
    vector = load_vector(str(output / "winner"))
    assert list(vector.layers) == [best["layer"]]
    assert vector.metadata["protocol"]["chosen"] == {k: best[k] for k in ("layer", "lr", "l2")}
    assert vector.metadata["selection"]["vector"]["score"] == pytest.approx(best["score"])
    assert vector.metadata["search"]["points"] == len(points) == 24
    lines = (output / "search.md").read_text().splitlines()
    scores = [float(line.split("|")[6]) for line in lines if line.startswith("| ") and line[2].isdigit()]
    assert scores == sorted(scores)
    assert len(scores) == 24
    assert "are not results" in said
    by_setting = {(p["layer"], p["lr"], p["l2"], p["epochs"]): p["score"] for p in points}
    assert all(by_setting[(*k[:3], 3)] <= by_setting[(*k[:3], 1)] for k in by_setting)
    monkeypatch.setattr(search_module, "train_vector", None)
    call(*words)  # nothing is trained again
    assert searched(output) == points
    assert "had other settings" in call(*words, "--first-seed", "5", code=1).output


def test_optuna_search_goes_on_to_the_same_end(
    tmp_path: Path, tasks: str, checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    words = ["search", "--model", checkpoint(), "--task", "toy_choice", *TRAINING, "--include-path", tasks]
    words += [
        "--strategy",
        "optuna",
        "--layers",
        "all",
        "--lr",
        "1e-3,1e-1",
        "--epochs",
        "1,2",
        "--l2",
        "0,0.1",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    call(*words, "--output", str(whole), "--trials", "5")
    original = search_module.train_vector

    def dying(model: Any, plan: Any, folder: Path, **more: Any) -> Any:
        if folder.name == "0002":
            raise KeyboardInterrupt
        return original(model, plan, folder, **more)

    with monkeypatch.context() as patched:
        patched.setattr(search_module, "train_vector", dying)
        assert (
            "the same command continues"
            in call(*words, "--output", str(cut), "--trials", "5", code=130).output
        )
    assert len(searched(cut)) == 2
    call(*words, "--output", str(cut), "--trials", "5")
    assert searched(cut) == searched(whole)
    best = min((Point(**{**p, "best_epoch": ()}) for p in searched(whole)), key=Point.order)
    vector = load_vector(str(whole / "winner"))
    assert list(vector.layers) == [best.layer]
    assert vector.digest() == load_vector(str(cut / "winner")).digest()


def test_optuna_draws_relative_rates(tmp_path: Path, tasks: str, checkpoint: Callable[..., str]) -> None:
    pytest.importorskip("optuna")
    words = ["search", "--model", checkpoint(), "--task", "toy_choice", *TRAINING, "--include-path", tasks]
    words += ["--strategy", "optuna", "--layers", "1", "--epochs", "1", "--output", str(tmp_path / "o")]
    assert "all numbers, or all relative" in call(*words, "--lr", "1e-3,0.1r", code=1).output
    words += ["--lr", "0.001r,0.1r"]
    said = call(*words, "--trials", "2").output
    call(*words, "--trials", "3")
    rates = [point["lr"] for point in searched(tmp_path / "o")]
    assert len(rates) == 3
    assert all(rate.endswith("r") and 0.001 <= float(rate[:-1]) <= 0.1 for rate in rates)
    assert f"lr {float(rates[0][:-1]):.2g}r" in said
    vector = load_vector(str(tmp_path / "o" / "winner"))
    assert vector.metadata["protocol"]["chosen"]["lr"] in rates


def test_optuna_that_is_not_there_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    words = ["search", "--model", "demo", "--task", "aft_demo_choice", "--strategy", "optuna"]
    assert "lm-eval-aft[optuna]" in call(*words, "--output", str(tmp_path / "o"), code=1).output


def test_metadata_reaches_training_scoring_and_the_printed_command(tasks: str, tmp_path: Path) -> None:
    (Path(tasks) / "sizes.py").write_text(SIZED)
    text = (Path(tasks) / "toy_choice.yaml").read_text().replace("toy_choice", "sized")
    lines = [line for line in text.splitlines() if not line.startswith(("dataset_", "  data_files"))]
    (Path(tasks) / "sized.yaml").write_text("\n".join([*lines, "custom_dataset: !function sizes.sized", ""]))
    own = ["--include-path", tasks, "--metadata", "size=18"]
    words = ["--model", "demo", *own, *"--train-docs 4 --selection-docs 6 --device cpu".split()]
    short = "--protocol maximum --layers 1 --epochs 1 --seeds 1 --retries 0".split()
    call("transfer", "--tasks", "sized", *words, *short, "--output", str(tmp_path / "t"))
    (cell,) = json.loads((tmp_path / "t/transfer.json").read_text())["cells"]
    assert cell["n"] == 18
    grid = "--layers 1 --lr 1e-2 --epochs 1".split()
    said = call("search", "--task", "sized", *words, *grid, "--output", str(tmp_path / "s")).output
    (printed,) = [line for line in said.splitlines() if line.startswith("  aft eval")]
    assert shlex.quote('{"size": 18}') in printed
    assert f"--include_path {tasks}" in printed
    command = shlex.split(printed.replace("RESULTS", str(tmp_path / "results")))[1:]
    call(*command)
