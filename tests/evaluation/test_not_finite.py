"""Answers that are NaN or infinite never reach a verdict; the cause is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lm_eval.api.instance import Instance

from lm_eval_aft import AFTError, SteeringVector, train_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.engine.checks import require_finite
from lm_eval_aft.evaluation.report import compare
from lm_eval_aft.lm import AFTLM
from tests.conftest import toy_documents
from tests.result_folders import steered_by, write_results
from tests.support.families import tiny_model, tiny_tokenizer

NAN, INF = math.nan, math.inf


def answered(folder: Path, answers: Callable[[int], list[Any]], *, as_text: bool = True) -> Path:
    """Replace the log-likelihoods in a result folder; as texts, as lm-eval logs them, or as numbers."""
    for path in folder.rglob("samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            values = [str(each) if as_text else each for each in answers(line["doc_id"])]
            line["resps"] = [[[value, "False"]] for value in values]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def pair(tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    """A baseline that is wrong everywhere, and a run of ``coefficient=30000`` that is right everywhere."""
    base = write_results(tmp_path / "base", {"arc": [0.0] * 40}, **settings)
    vector = steered_by(coefficient=30000.0)
    return base, write_results(tmp_path / "other", {"arc": [1.0] * 40}, vector=vector, **settings)


HALF = {"config": {"model_dtype": "torch.float16"}}


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize(
    "values", [[NAN, NAN], [-1.0, NAN], [INF, -1.0], [-INF, -INF], [-1.0, -INF]], ids=str
)
def test_one_answer_is_enough(tmp_path: Path, values: list[float], as_text: bool) -> None:
    base, other = pair(tmp_path, **HALF)
    answered(other, lambda i: values if i == 7 else [-1.0, -2.0], as_text=as_text)
    report = compare(base, other)
    assert (report.rows, report.family, report.corpus, report.flips) == ([], 0, [], [])
    (each,) = report.not_finite
    assert (each.run, each.task, each.n, each.of) == ("other", "arc", 1, 40)
    assert "float16 holds no number above 65,504" in each.cause
    assert "30000" in each.cause


def test_every_format_says_so(tmp_path: Path) -> None:
    base, other = pair(tmp_path, config={"model_dtype": "torch.bfloat16"})
    answered(other, lambda _: [NAN, NAN])
    result = CliRunner().invoke(aft, ["report", str(base), str(other), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for text in (result.output, *((tmp_path / "out" / f"report.{f}").read_text() for f in ("md", "html"))):
        assert "40 of 40" in text
        assert "coefficient is 30000" in " ".join(text.replace("│", " ").split())
        assert "better" not in text.replace(" better, ", "").replace('"good">better', "")
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (saved["rows"], saved["not_finite"][0]["n"]) == ([], 40)


def test_the_baseline_is_to_blame(tmp_path: Path) -> None:
    """Both sides NaN, as in folders of stock lm_eval: once "no detectable difference"."""
    stock = {"model": "hf", "model_dtype": "torch.float16", "aft": None}
    base, other = pair(tmp_path, config=stock)
    for folder in (base, other):
        answered(folder, lambda _: [NAN, NAN], as_text=False)
    report = compare(base, other)
    assert report.rows == []
    assert report.not_finite[0].cause == "float16 holds no number above 65,504. Use bfloat16 or float32."


def test_an_option_that_the_model_rules_out_is_a_number(tmp_path: Path) -> None:
    """Minus infinity on both sides, beside an option with a chance: stock's choice means something."""
    base, other = pair(tmp_path)
    for folder in (base, other):
        answered(folder, lambda _: [-1.0, -INF])
    report = compare(base, other)
    assert (report.rows[0].verdict, report.not_finite) == ("better", [])


def test_other_tasks_keep_their_verdicts(tmp_path: Path) -> None:
    base = write_results(tmp_path / "base", {"arc": [0.0] * 30, "boolq": [0.0] * 30})
    other = write_results(tmp_path / "other", {"arc": [1.0] * 30, "boolq": [1.0] * 30}, vector=steered_by())
    groups = {"groups": {"both": {"acc,none": 1.0}}, "group_subtasks": {"both": ["arc", "boolq"]}}
    for folder in (base, other):
        (file,) = folder.rglob("results_*.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | groups))
    assert [row["task"] for row in compare(base, other).groups] == ["both"]
    (samples,) = other.rglob("samples_arc_*.jsonl")
    samples.write_text(samples.read_text().replace('"-2.5"', '"nan"'))
    report = compare(base, other)
    assert [(row.task, row.verdict) for row in report.rows] == [("boolq", "better")]
    assert (report.groups, report.corpus) == ([], [])
    assert any("30 of 30 answers of arc are no finite numbers" in line for line in report.warnings)


def test_texts_written_from_such_numbers(tmp_path: Path) -> None:
    settings = {"gen_kwargs": {"until": ["\n"]}, "metric": "exact_match"}
    base = write_results(tmp_path / "base", {"gsm8k": [0.0] * 30}, **settings)
    vector = steered_by(coefficient=-9.0)
    aft_entry = {"not_finite": {"generate_until": 30}}
    other = write_results(tmp_path / "other", {"gsm8k": [1.0] * 30}, vector=vector, aft=aft_entry, **settings)
    report = compare(base, other)
    assert report.rows == []
    assert "coefficient is -9" in report.not_finite[0].cause


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose activations are numbers in float32 and not in float16."""
    folder = tmp_path_factory.mktemp("overflowing")
    model = tiny_model("llama")
    with torch.no_grad():
        for part in ("up_proj", "down_proj"):
            getattr(model.model.layers[1].mlp, part).weight.mul_(2000)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_dtype_that_the_baseline_cannot_bear(
    overflowing: str, toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    """`aft eval`, training and a dry run end before anything is scored, trained or written."""
    tasks, out, vector = toy_tasks(), tmp_path / "out", tmp_path / "v.safetensors"
    SteeringVector({2: torch.ones(32)}).save(vector)
    evaluation = ["eval", "--model", overflowing, "--vector", str(vector), "--tasks", "toy_choice"]
    evaluation += ["--output", str(out), "--device", "cpu", "--dtype", "float16"]
    evaluation += ["--model-args", "allow_mismatch=true", "--", "--include_path", tasks]
    training = ["train", "--model", overflowing, "--task", "toy_choice", "--include-path", tasks]
    training += ["--protocol", "rapid", "--device", "cpu", "--dtype", "float16"]
    for words in (evaluation, [*training, "--output", str(out)], [*training, "--dry-run"]):
        result = CliRunner().invoke(aft, words)
        assert result.exit_code == 1, result.output
        assert "NaN or infinite numbers in float16, without any vector" in result.output
        assert "Use bfloat16 or float32." in result.output
        assert not out.exists()


def test_a_baseline_that_breaks_on_a_document(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    """Only where a document has the word "ten": seen as soon as it is scored."""
    model = tiny_model("llama", 3)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("ten")] = math.inf
    lm = AFTLM(model, tokenizer=tokenizer, device="cpu")
    require_finite(lm)
    asked = [
        Instance("loglikelihood", {}, (f"Question : {word} ? Answer :", " yes"), 0) for word in ("one", "ten")
    ]
    assert [math.isnan(value) for value, _ in lm.loglikelihood(asked, disable_tqdm=True)] == [False, True]
    lm.require_finite = True
    with pytest.raises(AFTError, match="without any vector"):
        lm.loglikelihood(asked, disable_tqdm=True)
    with pytest.raises(AFTError, match="NaN or infinite numbers in float32, without any vector"):
        train_vector(
            lm,
            "toy_choice",
            protocol="rapid",
            epochs=1,
            layers="1",
            progress=False,
            include_path=[toy_tasks()],
        )


@pytest.mark.parametrize(("dtype", "size"), [("float16", 3e4), ("float32", 3e38)])
@pytest.mark.parametrize("task", ["toy_choice", "toy_generate"])
def test_a_vector_that_is_too_large(
    checkpoint: Callable[..., str],
    toy_tasks: Callable[..., str],
    tmp_path: Path,
    dtype: str,
    size: float,
    task: str,
) -> None:
    """Argmax of NaN is the first option: with the right answer there, it was once "better, p < 0.0001"."""
    documents = [document | {"gold": 0} for document in toy_documents(20, start=200)]
    tasks, out, vector = toy_tasks(test=documents), tmp_path / "out", tmp_path / "v.safetensors"
    SteeringVector({2: 4 * torch.ones(32)}, coefficient=size).save(vector)
    words = ["eval", "--model", checkpoint("llama"), "--vector", str(vector), "--tasks", task]
    words += ["--output", str(out), "--device", "cpu", "--dtype", dtype, "--", "--include_path", tasks]
    result = CliRunner().invoke(aft, words)
    assert result.exit_code == 0, result.output
    assert f"answers of {task} are no finite numbers" in " ".join(result.output.split())
    report = compare(out)
    assert report.rows == []
    assert f"{size:g}" in report.not_finite[0].cause
    assert dtype in report.not_finite[0].cause


def test_a_small_vector_is_judged(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    vector = tmp_path / "v.safetensors"
    SteeringVector({2: torch.ones(32)}).save(vector)
    words = [
        "eval",
        "--model",
        checkpoint("llama"),
        "--vector",
        str(vector),
        "--device",
        "cpu",
        "--dtype",
        "float16",
    ]
    words += [
        "--tasks",
        "toy_choice,toy_generate",
        "--output",
        str(tmp_path / "out"),
        "--",
        "--include_path",
        toy_tasks(),
    ]
    result = CliRunner().invoke(aft, words)
    assert result.exit_code == 0, result.output
    report = compare(tmp_path / "out")
    assert report.not_finite == []
    assert {row.task for row in report.rows} == {"toy_choice", "toy_generate"}
