"""Whole studies: shared work, a ledger that survives, a table that tells everything."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from lm_eval_aft import AFTError
from lm_eval_aft.cli.main import aft
from lm_eval_aft.studies import jobs
from lm_eval_aft.studies.config import read_bench_study
from tests.support.families import tiny_model, tiny_tokenizer

QUICK = {
    "protocol": "maximum", "layers": "1", "train_docs": 8, "selection_docs": 12, "epochs": 1,
    "lr": 1e-2, "l2": 0, "batch_size": 4, "retries": 0, "regression": False,
}  # fmt: skip
STUDY: dict[str, Any] = {
    "models": ["demo"],
    "tasks": ["toy_choice", {"task": "toy_generate", "limit": 6}],
    "methods": ["static", {"name": "placebo", "control": "random"}],
    "seeds": 2,
    "recipe": QUICK,
    "evaluation": {"limit": 16},
}


@pytest.fixture
def write(tmp_path: Path, toy_tasks: Callable[..., str]) -> Callable[..., Path]:
    """``write(**changes)``: a study file over the toy tasks."""
    folder = toy_tasks()

    def make(**changes: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**STUDY, "include_path": folder, **changes}))
        return path

    return make


def call(study: Path, output: Path, *more: str, code: int = 0) -> Result:
    words = ["bench", str(study), "--output", str(output), "--device", "cpu", *more]
    done = CliRunner().invoke(aft, words)
    assert done.exit_code == code, done.output
    return done


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "report.csv").open() as stream:
        return list(csv.DictReader(stream))


def states(output: Path) -> Counter[str]:
    report = json.loads((output / "report.json").read_text())
    return Counter(cell["state"] for cell in report["cells"])


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what sessions do: models loaded, vectors trained, baselines and cells scored."""
    from lm_eval_aft.evaluation import run
    from lm_eval_aft.lm import AFTLM
    from lm_eval_aft.training import run as training_run

    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: Callable[..., str]) -> None:
        plain = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[what(*args)] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    counted(AFTLM, "__init__", lambda *_: "loaded")
    counted(training_run, "run", lambda *_: "trained")
    counted(run, "score", lambda _lm, run, *_: "baseline" if run.name == "baseline" else "steered")
    return counts


def test_finished_cells_are_logged_and_those_of_an_earlier_call_too(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    from tests._util.test_tracking import events

    output, some = tmp_path / "out", {"tasks": ["toy_choice"], "methods": ["static"]}
    call(write(**some), output, "--log", "tensorboard", "--only", "*/seed-0")
    (name,) = [key for key in events(output / "tensorboard") if key.endswith("acc_norm/steered/difference")]
    assert name.startswith("demo/toy_choice/static/seed-0/toy_choice/")
    shutil.rmtree(output / "tensorboard")
    call(write(**some), output, "--log", "tensorboard", "--resume")
    found = events(output / "tensorboard")
    assert [step for step, _ in found[name]] == [1]
    assert [step for step, _ in found[name.replace("seed-0", "seed-1")]] == [2]


def test_a_study_shares_its_work_and_reruns_what_changed(
    write: Callable[..., Path], tmp_path: Path, done: Counter[str]
) -> None:
    output = tmp_path / "out"
    methods = [{"method": "static"}, {"name": "long", "epochs": 2}, {"name": "placebo", "control": "random"}]
    tasks = ["toy_choice", {"task": "toy_generate", "limit": 6}, {"task": "aft_demo_choice", "limit": 8}]
    some = {"methods": methods, "tasks": tasks, "seeds": 1}
    said = call(write(**some), output).output
    assert done == {"loaded": 1, "trained": 9, "baseline": 3, "steered": 9}
    assert "9 cells: 9 done" in said
    before = (output / "report.csv").read_bytes()
    done.clear()

    call(write(**some), output, "--resume")  # nothing to do, not even a model to load
    assert not done
    assert (output / "report.csv").read_bytes() == before

    methods[1] = {"name": "long", "epochs": 3}
    tasks[1] = {"task": "toy_generate", "limit": 6, "train_docs": 9}
    call(write(**some), output, "--resume", "--only", "demo/toy_choice/long/*")
    assert done == {"loaded": 1, "trained": 1, "steered": 1}
    assert states(output) == {"done": 5, "left out": 4}
    done.clear()

    call(write(**some), output, "--resume")  # the task's three cells, and the method's on the third task
    assert done == {"loaded": 1, "trained": 4, "steered": 4}
    done.clear()

    tasks[0] = {"task": "toy_choice", "limit": 10}  # scored on fewer documents: nothing to train anew
    call(write(**some), output, "--resume")
    assert done == {"loaded": 1, "baseline": 1, "steered": 3}
    assert {row["n"] for row in rows(output) if row["task"] == "toy_choice"} == {"10"}


def test_the_report_tells_every_cell_in_every_format(write: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    call(write(seeds=3, evaluation={"limit": 16, "placebos": 1}, earlier="methods"), output)
    report = json.loads((output / "report.json").read_text())
    assert states(output) == {"done": 12}
    assert report["family"] == len(
        {(c["vector"]["sha256"], c["task"]) for c in report["cells"] if not c["control"]}
    )
    judged = [cell["row"] for cell in report["cells"] if not cell["control"]]
    assert all(row["verdict"] and row["p_adjusted"] >= row["p_value"] for row in judged)
    assert all(cell["row"]["p_adjusted"] is None for cell in report["cells"] if cell["control"])
    assert len(report["seeds"]) == 4  # one model, two tasks, two methods
    assert {row["method"] for row in report["methods"]} == {"static", "placebo"}
    assert all(row["low"] <= row["mean"] <= row["high"] for row in report["methods"])
    (contrast,) = report["contrasts"]
    means = {row["method"]: row["mean"] for row in report["methods"]}
    assert contrast["mean"] == pytest.approx(means["placebo"] - means["static"])
    table = rows(output)
    primary = [row for row in table if row["primary"] == "True" and "placebo/" not in row["run"]]
    assert len(primary) == 12
    assert sum("placebo/random-0" in row["run"] and row["primary"] == "True" for row in table) == 12
    markdown, page = (output / "report.md").read_text(), (output / "report.html").read_text()
    for cell in report["cells"]:
        text = f"{100 * cell['row']['difference']:+.2f}".replace("-", "−").replace("+0.00", "0.00")
        length = f"{cell['vector']['norm']:.3g} ({100 * cell['vector']['norm_share']:.3g} %)"
        assert f" | {length} | " in markdown
        assert length in page
        assert f"| {cell['task']} | {cell['method']} | {cell['seed']} |" in markdown
        assert text in markdown
        assert text in page
    for heading in (
        "By model",
        "By task",
        "Methods",
        "Over seeds",
        "Placebos",
        "The earlier study's figures",
    ):
        assert f"## {heading}" in markdown
    assert "+17.00 (n = not told)" in markdown  # the earlier study's best, beside ours with its n
    assert "://" not in page


def test_one_seed_or_two_allow_no_claim_about_a_method(write: Callable[..., Path], tmp_path: Path) -> None:
    call(write(methods=["static"], tasks=["toy_choice"]), tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["seeds"] == []
    assert [row["low"] for row in report["methods"]] == [None]
    assert "no claim: fewer than 3 seeds" in (tmp_path / "out/report.md").read_text()


def test_a_pair_that_stays_behind_is_pruned_and_told(
    write: Callable[..., Path], tmp_path: Path, done: Counter[str]
) -> None:
    # A step of 10 in every entry ruins the model, so no retry can beat the baseline.
    ruin = {**QUICK, "lr": 10.0, "retries": 3, "clip": 0, "selection_docs": 100}
    study = write(recipe=ruin, prune=True, seeds=3, methods=["static"], tasks=["aft_demo_choice"])
    said = call(study, tmp_path / "out").output
    assert done["trained"] == 1
    assert states(tmp_path / "out") == {"done": 1, "pruned": 2}
    assert "Negative results" in said
    report = json.loads((tmp_path / "out/report.json").read_text())
    (negative,) = report["negative"]
    assert "after 3 retries" in negative["why"]
    assert negative["whole_pair"]
    assert negative["selection_change"] > 0
    assert len(negative["pruned"]) == 2
    markdown = (tmp_path / "out/report.md").read_text()
    assert markdown.count("| aft_demo_choice | static |") == 3  # never dropped from the table
    assert markdown.count("pruned: its first seed was no better than the baseline") == 2
    call(study, tmp_path / "out", "--resume")
    assert done["trained"] == 1


@pytest.mark.slow
def test_a_cell_that_fails_stops_no_other_and_is_tried_again(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["static", {"name": "margin", "choice_loss": "margin"}]  # not for generation
    study = write(methods=methods, seeds=1)
    plain = jobs.Session._train

    def broken(self: jobs.Session, lm: Any, cell: Any) -> None:
        if cell.name == "demo/toy_choice/margin/seed-0":
            raise RuntimeError("the cat sat on the power cord")
        plain(self, lm, cell)

    with monkeypatch.context() as patched:
        patched.setattr(jobs.Session, "_train", broken)
        said = call(study, tmp_path / "out", code=1).output
    assert states(tmp_path / "out") == {"done": 2, "failed": 2}
    assert "2 of 4 cells failed" in said
    assert "Traceback" not in said
    assert "the cat sat" in (tmp_path / "out/report.md").read_text()
    (trace,) = (tmp_path / "out/errors").iterdir()
    assert "Traceback" in trace.read_text()
    call(study, tmp_path / "out", "--resume", code=1)
    assert states(tmp_path / "out") == {"done": 3, "failed": 1}


def test_an_output_folder_is_not_mixed_up(write: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("draft")
    assert "no study wrote what is in it" in call(write(), output, code=1).output
    (output / "thesis.tex").unlink()
    small = write(tasks=["toy_choice"], methods=["static"], seeds=1)
    assert "No cell of the study fits llama" in call(small, output, "--only", "llama", code=1).output
    call(small, output)
    assert "--resume" in call(small, output, code=1).output
    with (output / "ledger.jsonl").open("a") as stream:
        stream.write('{"event": "cell", "key": "cut sho')  # sudden death in mid-line
    call(small, output, "--resume")
    lines = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("cell") == 1


def test_answers_that_are_not_finite_get_no_verdict(write: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    study = write(tasks=["toy_choice"], methods=["static"], seeds=1)
    call(study, output)
    (samples,) = output.glob("scores/*/steered/*/samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    lines[0]["resps"][0] = [["nan", "False"]]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger = output / "ledger.jsonl"
    kept = [line for line in ledger.read_text().splitlines() if json.loads(line)["event"] != "cell"]
    ledger.write_text("\n".join(kept) + "\n")
    said = " ".join(call(study, output, "--resume", code=1).output.split())
    assert "1 of 16 answers of toy_choice are no finite numbers; no verdict" in said
    (cell,) = json.loads((output / "report.json").read_text())["cells"]
    assert (cell["state"], cell["row"]) == ("failed", None)
    assert "too large for this model" in cell["why"]


SIZED = """
import json
from pathlib import Path
import datasets

def sized(size, pretrained, softmax_dtype=None, **metadata):
    read = lambda name: (Path(__file__).parent / f"{name}.jsonl").read_text().splitlines()
    rows = {name: [json.loads(line) for line in read(name)] for name in ("train", "test")}
    return {name: datasets.Dataset.from_list(rows[name][:int(size)]) for name in rows}
"""


@pytest.fixture
def sized(toy_tasks: Callable[..., str]) -> Path:
    """A folder with the task ``sized``, whose documents are as many as the metadata says."""
    folder = Path(toy_tasks())
    text = (folder / "toy_choice.yaml").read_text().replace("toy_choice", "sized")
    lines = [line for line in text.splitlines() if not line.startswith(("dataset_", "  data_files"))]
    (folder / "sized.yaml").write_text("\n".join([*lines, "custom_dataset: !function sizes.sized", ""]))
    (folder / "sizes.py").write_text(SIZED)
    return folder


def test_tasks_made_from_metadata(sized: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    """Model arguments and the study's own metadata reach training and scoring, and are in the address."""
    output = tmp_path / "out"
    tasks = [
        {"task": "sized", "name": f"of-{size}", "task_metadata": {"size": size}, "limit": 100}
        for size in (20, 12)
    ]
    recipe = {**QUICK, "train_docs": 4, "selection_docs": 6}
    call(write(tasks=tasks, methods=["static"], seeds=1, recipe=recipe), output)
    found = {row["task"]: row["n"] for row in rows(output) if row["primary"] == "True"}
    assert found == {"of-20": "20", "of-12": "12"}
    cells = jobs.build_cells(read_bench_study(tmp_path / "study.yaml"))
    assert len({cell.baseline_key for cell in cells}) == 2
    call(write(tasks=[{"task": "sized"}], methods=["static"], seeds=1), tmp_path / "other", code=1)
    (cell,) = json.loads((tmp_path / "other/report.json").read_text())["cells"]
    assert "size" in cell["why"]


def test_a_model_that_is_not_finite_ends_its_cells_and_no_others(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for part in ("up_proj", "down_proj"):
            getattr(model.model.layers[1].mlp, part).weight.mul_(2000)
    model.save_pretrained(tmp_path / "big")
    tiny_tokenizer().save_pretrained(tmp_path / "big")
    models = ["demo", {"name": "big", "pretrained": str(tmp_path / "big"), "dtype": "float16"}]
    study = write(models=models, tasks=["toy_choice"], methods=["static"], seeds=1)
    said = " ".join(call(study, tmp_path / "out", code=1).output.split())
    assert "The model gives NaN or infinite numbers in float16, without any vector" in said
    assert states(tmp_path / "out") == {"done": 1, "failed": 1}
    session = jobs.Session(jobs.Store(tmp_path / "s"), device="cpu", batch_size="4", data=None)
    good, bad = jobs.build_cells(read_bench_study(study))
    loaded = session.model(good)
    with pytest.raises(AFTError, match="in float16"):
        session.model(bad)
    again = session.model(good)  # not the one that was refused
    assert again.get_model_info()["model_dtype"] == loaded.get_model_info()["model_dtype"]
    assert again.config.hidden_size == loaded.config.hidden_size != model.config.hidden_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "models: must have at least one entry"),
        ({"models": ["/no/such/model"]}, r"models\[0\].pretrained: there is no folder /no/such/model"),
        ({"models": [{"name": "m"}]}, r"models\[0\].pretrained: is missing"),
        ({"models": ["demo", "demo"]}, "models: 'demo' occurs twice"),
        (
            {"models": ["${AFT_NO_SUCH_VARIABLE}/m"]},
            r"models\[0\]: the environment has no variable AFT_NO_SUCH",
        ),
        ({"models": [{"pretrained": "demo", "color": 1}]}, r"models\[0\].color: there is no such field"),
        ({"tasks": ["a,b"]}, r"tasks\[0\].task: names several tasks"),
        ({"tasks": [{"task": "t", "limit": 0}]}, r"tasks\[0\].limit: must be at least 1, got 0"),
        ({"tasks": [{"task": "t", "epochs": -1}]}, r"tasks\[0\] \(t\): epochs=-1 is invalid"),
        ({"methods": [{"name": "x", "method": "magic"}]}, r"methods\[0\] \(x\): .*magic"),
        (
            {"methods": [{"name": "x", "colour": 3}]},
            r"methods\[0\] \(x\): A protocol has no setting 'colour'",
        ),
        (
            {"methods": [{"name": "x", "first_seed": 3}]},
            r"methods\[0\]: remove first_seed: the study itself sets this",
        ),
        (
            {"methods": [{"name": "x y"}]},
            r"methods\[0\].name: cannot be a name \(letters, digits and _ - . only; .*, got 'x y'",
        ),
        ({"recipe": {"protocol": "swift"}}, "recipe: There is no protocol 'swift'"),
        ({"recipe": {"lr": "fast"}}, "recipe: "),
        ({"seeds": 0}, "seeds: must be a whole number of at least 1"),
        ({"seeds": 10**30}, "seeds: must be 10,000 at most"),
        ({"recipe": {"lr": 10**400}}, "recipe: lr=1000"),
        ({"seeds": [1, 1]}, "seeds: '1' occurs twice"),
        ({"evaluation": {"limits": 3}}, "evaluation.limits: there is no such field; did you mean limit"),
        ({"evaluation": {"batch_size": "big"}}, "evaluation.batch_size: must be a positive number or auto"),
        ({"prune": True}, "prune: needs a recipe with retries"),
        ({"prune": "yes please"}, "prune: must be true or false"),
        ({"earlier": "latest"}, "earlier: there is no table 'latest'"),
        ({"data": "no/such/folder"}, "data: there is no folder"),
        ({"modles": []}, "modles: there is no such field; did you mean models"),
    ],
)
def test_what_is_wrong_with_a_study_is_said(
    changes: dict[str, Any], message: str, write: Callable[..., Path]
) -> None:
    with pytest.raises(AFTError, match=message):
        read_bench_study(write(**changes))


def test_all_faults_are_told_at_once(write: Callable[..., Path]) -> None:
    with pytest.raises(AFTError, match="has 3 faults") as told:
        read_bench_study(write(seeds=-1, tasks=[{"task": "t", "limit": 0}], colour="red"))
    assert all(word in str(told.value) for word in ("seeds: ", "tasks[0].limit: ", "colour: "))


# Dies without a word at the Nth thing of some kind that the study does.
DYING = """
import os, signal, sys
kind, count = sys.argv.pop(1), int(sys.argv.pop(1))
def dies_at(owner, name):
    plain = getattr(owner, name)
    def wrapper(*args, **kwargs):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    setattr(owner, name, wrapper)
from lm_eval_aft.training import checkpoint
from lm_eval_aft.evaluation import run as evaluation
from lm_eval_aft.studies import jobs
dies_at(*{"epoch": (checkpoint.RunRecorder, "save"), "score": (evaluation, "score"),
          "settle": (jobs.Store, "settle"), "line": (jobs.StudyLedger, "append")}[kind])
jobs.Store.settle = staticmethod(jobs.Store.settle)
from lm_eval_aft.cli.main import aft
aft(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_killed_again_and_again_ends_with_the_same_table(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    study = write(recipe={**QUICK, "epochs": 2}, methods=["static"])
    call(study, tmp_path / "whole")
    words = ["bench", str(study), "--output", str(tmp_path / "killed"), "--device", "cpu", "--resume"]
    for kind, count in (("epoch", 1), ("line", 2), ("score", 1), ("settle", 1)):
        died = subprocess.run(
            [sys.executable, "-c", DYING, kind, str(count), *words],
            env=os.environ,
            capture_output=True,
            check=False,
        )
        assert died.returncode == -signal.SIGKILL, (kind, died.stdout.decode(), died.stderr.decode())
    call(study, tmp_path / "killed", "--resume")
    assert (tmp_path / "killed/report.csv").read_bytes() == (tmp_path / "whole/report.csv").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "killed/ledger.jsonl").read_text().splitlines()]
    finished = [line["name"] for line in lines if line["event"] == "cell"]
    assert len(finished) == len(set(finished)) == 4  # one line per finished cell


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_local_study_in_small(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer seeds, methods and documents; the models, the tasks and their real data as shipped."""
    monkeypatch.setenv("AFT_TEST_DATA", str(data_root))
    shipped = Path(__file__).parents[2] / "scripts/studies/local.yaml"
    whole = read_bench_study(shipped)
    assert [len(part) for part in (whole.models, whole.tasks, whole.methods, whole.seeds)] == [3, 5, 3, 2]
    table = yaml.safe_load(shipped.read_text())
    table["tasks"] = ["aft_demo_choice", {"task": "aft_demo_math", "limit": 4}, table["tasks"][2]]
    table |= {"methods": ["static"], "seeds": 1, "evaluation": {"limit": 8}}
    table["recipe"] |= {"layers": "50%", "train_docs": 8, "selection_docs": 8}
    study = tmp_path / "local.yaml"
    study.write_text(yaml.safe_dump(table))
    call(study, tmp_path / "out")
    assert states(tmp_path / "out") == {"done": 9}
    assert {row["n"] for row in rows(tmp_path / "out")} == {"4", "8"}


class SuddenDeath(BaseException):
    """Goes through every handler of errors."""


def test_a_study_interrupted_at_any_point_ends_with_the_same_table(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval_aft.evaluation import run
    from lm_eval_aft.studies import jobs
    from lm_eval_aft.training import checkpoint

    study = write(recipe={**QUICK, "epochs": 2}, methods=["static"], tasks=["toy_choice"])
    call(study, tmp_path / "whole")
    output = tmp_path / "killed"
    # In the middle of training; before a vector gets its place; while scoring; before a line is written.
    for owner, name, count in (
        (checkpoint.RunRecorder, "save", 1),
        (jobs.Store, "settle", 1),
        (run, "score", 0),
        (jobs.StudyLedger, "append", 1),
    ):
        plain, left = getattr(owner, name), [count]

        def dying(*args: Any, plain: Any = plain, left: list[int] = left, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise SuddenDeath
            return plain(*args, **kwargs)

        words = ["bench", str(study), "--output", str(output), "--device", "cpu", "--resume"]
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, staticmethod(dying) if name == "settle" else dying)
            with pytest.raises(SuddenDeath):
                CliRunner().invoke(aft, words, catch_exceptions=False)
    call(study, output, "--resume")
    assert (output / "report.csv").read_bytes() == (tmp_path / "whole/report.csv").read_bytes()
    lines = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines if line["event"] == "cell") == [
        "demo/toy_choice/static/seed-0",
        "demo/toy_choice/static/seed-1",
    ]
