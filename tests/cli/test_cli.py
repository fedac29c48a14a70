"""Commands: what users type, and one clear message for what goes wrong."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from lm_eval_aft import SteeringVector, load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.cli.options import ended
from lm_eval_aft.cli.train import train_vector
from lm_eval_aft.harness.tasks import tasks_path
from tests.result_folders import write_results

SMALL = ["--train-docs", "12", "--selection-docs", "12", "--seeds", "1", "--epochs", "1", "--layers", "1-2"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(aft, list(arguments))


def refused(result: Result, *words: str) -> None:
    """Non-zero exit, one message, no traceback."""
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    text = result.output
    assert text.count("Error:") == 1
    assert "Traceback" not in text
    for word in words:
        assert word in text, text


@pytest.fixture
def trained(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> tuple[str, str, Path]:
    """(model, task folder, vector folder) of a run through the command line."""
    model, tasks, folder = checkpoint("llama"), toy_tasks(), tmp_path / "vector"
    base = ["train", "--model", model, "--task", "toy_choice", "--include-path", tasks]
    result = call(*base, *SMALL, "--output", str(folder))
    assert result.exit_code == 0, result.output
    assert "baseline" in result.output
    assert "the numbers above are not results" in result.output
    assert f"--output {folder}-results -- --include_path {tasks}" in result.output
    return model, tasks, folder


def test_train_then_eval(trained: tuple[str, str, Path], tmp_path: Path) -> None:
    model, tasks, folder = trained
    result = call(
        *("eval", "--model", model, "--vector", str(folder), "--tasks", "toy_choice,toy_generate"),
        *("--placebo", "random:2", "--all-seeds", "--output", str(tmp_path / "results"), "--"),
        *("--include_path", tasks, "--limit", "10", "--batch_size", "4"),
    )
    assert result.exit_code == 0, result.output
    runs = [
        "baseline",
        "steered/vector",
        "steered/vector-seed-0",
        "placebo/vector-random-0",
        "placebo/vector-random-1",
    ]
    for run in runs:
        (results,) = (tmp_path / "results" / run).rglob("results_*.json")
        content = json.loads(results.read_text())
        assert content["config"]["model"] == "aft"
        assert content["config"]["aft"]["softmax_dtype"] == "torch.float32"
        assert (content["config"]["aft"]["vector"] is None) == (run == "baseline")
        samples = sorted((tmp_path / "results" / run).rglob("samples_*.jsonl"))
        assert [len(path.read_text().splitlines()) for path in samples] == [10, 10]
    assert "McNemar p" in result.output
    again = call(
        *("eval", "--model", model, "--vector", str(folder), "--tasks", "toy_choice"),
        *("--output", str(tmp_path / "results"), "--", "--include_path", tasks),
    )
    refused(again, "already holds baseline")


@pytest.mark.slow
def test_stock_lm_eval_gives_the_same_samples(trained: tuple[str, str, Path], tmp_path: Path) -> None:
    """`aft eval` and the stock command, both steered, agree document by document."""
    model, tasks, folder = trained
    ours = tmp_path / "ours"
    flags = ["--include_path", tasks, "--limit", "10"]
    result = call(
        *(
            "eval",
            "--model",
            model,
            "--vector",
            str(folder),
            "--tasks",
            "toy_choice",
            "--output",
            str(ours),
            "--",
        ),
        *flags,
    )
    assert result.exit_code == 0, result.output
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "aft", "--tasks", "toy_choice", *flags]
    arguments = f"pretrained={model},vector={folder},softmax_dtype=float32"
    done = subprocess.run(
        [*command, "--model_args", arguments, "--log_samples", "--output_path", str(tmp_path / "stock")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]

    def samples(root: Path) -> list[object]:
        (path,) = root.rglob("samples_*.jsonl")
        return [(s["doc_id"], s["resps"], s["acc"]) for s in map(json.loads, path.read_text().splitlines())]

    assert samples(ours / "steered") == samples(tmp_path / "stock")


def test_dry_run_writes_nothing(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    base = ["train", "--model", checkpoint("llama"), "--task", "toy_choice", "--include-path", toy_tasks()]
    result = call(*base, *SMALL, "--output", str(folder), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "candidates" in result.output
    assert not folder.exists()


def test_bad_training_input(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    model, tasks, out = checkpoint("llama"), toy_tasks(), tmp_path / "out"
    good = {"--model": model, "--task": "toy_choice", "--include-path": tasks, "--output": str(out)}

    def train(**change: str) -> Result:
        options = good | {f"--{key.replace('_', '-')}": value for key, value in change.items()}
        return call("train", *[word for pair in options.items() for word in pair])

    refused(train(model=str(tmp_path / "no-model")), "cannot be loaded", "Hub")
    refused(train(layers="9"), "Layer 9 is out of range: this model has blocks 0 to 3")
    refused(train(task="toy_choise"), "no harness task 'toy_choise'", "toy_choice")
    refused(train(train_docs="999"), "60 usable ones")
    refused(train(lr="-1"), "lr=-1.0 is invalid")
    refused(train(metric="acc", objective="lm"), "does not fit")
    refused(train(include_path=str(tmp_path / "nowhere")), "No such task folder")
    refused(call("train", "--model", model, "--task", "toy_choice"), "No output folder")
    text = (Path(tasks) / "toy_choice.yaml").read_text().replace("training_split: train\n", "")
    (Path(tasks) / "untrained.yaml").write_text(text.replace("task: toy_choice", "task: untrained"))
    refused(train(task="untrained"), "has no training split; its data has: train, test")
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    refused(train(), "is not empty", "--overwrite")
    for flag in ("--overwrite", "--resume"):
        words = [word for pair in good.items() for word in pair]
        refused(call("train", *words, flag), "no training run wrote what is in it")
    assert (out / "mine.txt").read_text() == "keep me"


def test_bad_vectors(checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path) -> None:
    tasks = toy_tasks()
    whole = SteeringVector({0: torch.ones(32)}).save(tmp_path / "whole.safetensors")
    files = {
        "hidden size 16, the model 32": SteeringVector({0: torch.ones(16)}).save(tmp_path / "narrow"),
        "Layer 7 is out of range": SteeringVector({7: torch.ones(32)}).save(tmp_path / "deep"),
        "truncated": tmp_path / "cut.safetensors",
        "pickle": tmp_path / "renamed.safetensors",
        "NaN": tmp_path / "nan.safetensors",
        "No steering vector": tmp_path / "nothing",
    }
    files["truncated"].write_bytes(whole.read_bytes()[:-40])
    files["pickle"].write_bytes(pickle.dumps([1]))
    raw = bytearray(whole.read_bytes())
    raw[-4:] = b"\x00\x00\xc0\x7f"
    files["NaN"].write_bytes(bytes(raw))
    for word, path in files.items():
        out = tmp_path / "results"
        result = call(
            *("eval", "--model", checkpoint("llama"), "--vector", str(path), "--tasks", "toy_choice"),
            *("--output", str(out), "--", "--include_path", tasks),
        )
        refused(result, word)
        assert not out.exists()


@pytest.mark.slow
def test_stock_lm_eval_shows_one_message(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    arguments = f"pretrained={checkpoint('llama')},vector={tmp_path / 'nothing'}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "aft", "--tasks", "arc_easy"]
    done = subprocess.run(
        [*command, "--model_args", arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Error: No steering vector at" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_bad_eval_input(trained: tuple[str, str, Path], tmp_path: Path) -> None:
    model, _tasks, folder = trained
    good = ["eval", "--model", model, "--vector", str(folder), "--tasks", "toy_choice"]
    good += ["--output", str(tmp_path / "results")]
    refused(call(*good, "--placebo", "magic"), "no placebo 'magic'")
    refused(call(*good), "no harness task 'toy_choice'")
    refused(call(*good, "--model-args", "dtype"), "Cannot read model arguments")
    refused(call(*good, "--", "--model_args", "a=1"), "belong before the `--`")
    refused(call(*good, "toy_generate"), "no flag 'toy_generate'", "Separate several tasks by commas")
    refused(call(*good, "--", "--limits", "3"), "no flag '--limits'", "lm_eval run --help")


def test_tasks_path_and_help() -> None:
    assert Path(call("tasks-path").output.strip()) == tasks_path()
    assert (tasks_path() / "aft_leaderboard" / "aft_leaderboard.yaml").is_file()
    for command in (["--help"], ["train", "--help"], ["eval", "--help"], ["tasks", "--help"]):
        text = call(*command).output
        assert "Example" in text or "aft train" in text
    assert CliRunner().invoke(train_vector, ["--help"]).exit_code == 0


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_in_an_encoding_without_all_characters(tmp_path: Path, encoding: str) -> None:
    """As in a pipe on Windows, and in the C locale: a minus sign stays one, and the files are written."""
    baseline = write_results(tmp_path / "base", {"arc_easy": [1.0] * 10})
    steered = write_results(tmp_path / "steered", {"arc_easy": [1.0] * 6 + [0.0] * 4})
    output = tmp_path / "naïve 北京"
    words = [sys.executable, "-m", "lm_eval_aft.cli.main", "report", baseline, steered, "-o", output]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run(words, env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    printed = result.stdout.decode(encoding, "replace")
    assert "-40.00" in printed
    assert "Written: " in printed
    assert "\N{MINUS SIGN}40.00" in (output / "report.md").read_text(encoding="utf-8")


def test_characters_that_an_encoding_lacks() -> None:
    """Bytes of a file name that Python could not decode are printed as they are."""
    code = "from lm_eval_aft.cli.options import PlainCommand\n"
    code += r"def show(): print('\u2212\u00b1\u5317\udce9')" + "\n"
    code += "PlainCommand('c', callback=show).main([])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (result.stdout, result.returncode) == (b"-+/-?\xe9\n", 0), result.stderr


def test_the_command_to_go_on_with_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ended(KeyboardInterrupt(), Path("my results"))
    assert "go on with --resume --output 'my results'" in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_lists_splits_and_metrics() -> None:
    from lm_eval_aft.harness.tasks import list_tasks

    found = {task.name: task for task in list_tasks("*")}
    hellaswag = found["hellaswag"]
    assert (hellaswag.training_split, hellaswag.evaluation_split) == ("train", "validation")
    assert (hellaswag.trainable, hellaswag.metrics) == (True, ("acc", "acc_norm"))
    assert not found["lambada_openai"].trainable
    assert call("tasks", "gsm8k").exit_code == 0


@pytest.mark.slow
def test_leaderboard_group_is_set_like_the_stock_one(test_data: Path) -> None:
    """Same stock tasks, n-shot and few-shot split as lm-eval's own `openllm`."""
    import lm_eval.tasks
    import yaml

    stock = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / "benchmarks" / "openllm.yaml").read_text())
    ours = yaml.safe_load((tasks_path() / "aft_leaderboard" / "aft_leaderboard.yaml").read_text())
    wanted = {entry["task"]: entry for entry in stock["task"]}
    assert [entry["task"] for entry in ours["task"]] == ["arc_challenge", "hellaswag", "gsm8k"]
    assert all(entry == wanted[entry["task"]] for entry in ours["task"])
    from lm_eval_aft.harness.tasks import full_index

    tasks = full_index().load("aft_leaderboard")["tasks"]
    shots = {name: task.config.num_fewshot for name, task in tasks.items()}
    assert shots == {"arc_challenge": 25, "hellaswag": 10, "gsm8k": 5}
    assert all(task.config.fewshot_split == "train" for task in tasks.values())


def test_python_api_is_lazy() -> None:
    code = "import sys, lm_eval_aft; assert not {'torch', 'click', 'lm_eval'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert load_vector.__module__ == "lm_eval_aft.library.load"
