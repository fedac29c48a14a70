"""What README, CONTRIBUTING and the pages in docs/ show runs as it stands there, and nothing is left out.

By default every command is parsed by the program that it calls, and the examples that people begin with run.
The slow tests run all pages from the first block to the last, with the demo model in place of larger ones,
its tasks in place of stock ones, and a few documents.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

from lm_eval_aft import load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.cli.options import parse_model_args, parse_pairs
from lm_eval_aft.cli.train import train_vector
from lm_eval_aft.harness.model_args import OWN, read_model_args
from lm_eval_aft.harness.tasks import tasks_path
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.studies.config import (
    BenchStudy,
    CrossScores,
    Evaluation,
    LibraryStudy,
    MethodEntry,
    ModelEntry,
    TaskEntry,
    VectorDefaults,
)
from lm_eval_aft.training.recipe import PROTOCOLS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
# What a block may be in: commands, other code, formulas, and what is not code.
LANGUAGES = {"sh", "python", "yaml", "json", "math", "text"}


class Block(NamedTuple):
    """A code block: where it begins, the language it names, and its text."""

    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    found, text = [], page.read_text()
    for match in re.finditer(r"^```(.*)\n((?:(?!```).*\n)*)```$", text, re.M):
        found.append(Block(text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.M)), "a block that is not read"
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block, without comments and variables before them."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words:
                yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_of_a_kind_that_is_tested(page: Path) -> None:
    assert [block for block in blocks(page) if block.language not in LANGUAGES] == []
    for block in blocks(page):
        if block.language == "yaml":
            assert yaml.safe_load(block.text), block
        elif block.language == "json":
            assert [json.loads(line) for line in block.text.splitlines()], block
        elif block.language == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")


def parse(command: click.Command, words: list[str]) -> None:
    """Raise unless a command line is one of this command: options, choices, arguments that must be there."""
    words = [word for word in words if word != "--offline"]  # it would take effect here
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    try:
        context = command.make_context(command.name, words)
    except click.BadParameter as error:
        if "does not exist" in error.message:  # a file that a command before this one would write
            return
        raise
    if args := context.params.get("model_args"):
        parse_model_args(args)


def check(words: list[str]) -> None:
    """Raise unless a command is one that its program takes."""
    match words:
        case ["aft", *rest]:
            parse(aft, rest)
        case ["train-vector", *rest] | ["accelerate", "launch", "-m", "lm_eval_aft.cli.train", *rest]:
            parse(train_vector, rest)
        case ["lm_eval", "--model", "aft", "--model_args", args, *_]:
            read_model_args(parse_pairs(args))
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert set(targets) <= set(known)
        case ["python", script, *rest]:
            options = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert options <= set(re.findall(r"--[a-z-]+", (ROOT / script).read_text()))
        case ["source", ".venv/bin/activate"]:
            pass
        case _:
            raise AssertionError("nothing here knows whether this is right")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_such_as_their_programs_take(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        for words in commands(block) if block.language == "sh" else ():
            try:
                check(words)
            except Exception as error:
                pytest.fail(f"{page.name}:{block.line}: {shlex.join(words)}\n{error}")


def test_a_wrong_command_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for wrong in (
        "aft evaluate --model demo",
        "aft eval --model demo --vector v --output o",
        "aft report results --colour",
        "train-vector --model demo --task t --control none --output o",
        "train-vector --model demo --task t --output o --model-args revison=main",
        "lm_eval --model aft --model_args pretrained=demo,vectr=v --tasks t",
        "make tests",
        "python scripts/selection_noise.py --simulations-only",
        "rm -r results",
    ):
        with pytest.raises((click.ClickException, KeyError, AssertionError)):
            check(shlex.split(wrong))


# The examples that people begin with.


def test_own_task_in_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (_, _, definition), (_, _, lines), (_, _, shown), *_ = blocks(ROOT / "docs/own-task.md")
    file = Path(definition.splitlines()[0].removeprefix("# "))
    file.parent.mkdir()
    file.write_text(definition)
    documents = [json.loads(line) for line in lines.splitlines()]
    (file.parent / "train.jsonl").write_text(lines)
    others = [{**document, "question": document["question"] + " Really?"} for document in documents]
    (file.parent / "test.jsonl").write_text("".join(json.dumps(document) + "\n" for document in others))
    said = []
    for command in shown.splitlines():
        name, *arguments = shlex.split(command)
        outcome = CliRunner().invoke(train_vector if name == "train-vector" else aft, arguments)
        assert outcome.exit_code == 0, f"{command}\n{outcome.output}"
        said.append(outcome.output)
    assert "colours" in said[0]
    assert load_vector("colours").metadata["task"] == "colours"
    assert "colours" in said[3]


def python_of(page: Path) -> dict[str, object]:
    """Run the one Python block of a page; return its names."""
    (code,) = (block.text for block in blocks(page) if block.language == "python")
    names: dict[str, object] = {}
    exec(compile(code, page.name, "exec"), names)
    return names


def test_python_example_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = python_of(README)
    assert "better" in capsys.readouterr().out
    assert all(not block._forward_hooks for block in names["pipe"].model.modules())  # type: ignore[attr-defined]


def test_python_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = python_of(ROOT / "docs/start.md")
    printed = capsys.readouterr().out
    assert "aft_demo_choice" in printed
    model, inputs = names["model"], names["inputs"]
    plain, steered, _ = names["texts"]  # type: ignore[misc]
    again = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # type: ignore[attr-defined, arg-type]
    assert torch.equal(plain, again)
    told = [names["tokenizer"].decode(text[0]) for text in (plain, steered)]  # type: ignore[attr-defined]
    assert ["buckets" in text for text in told] == [False, True]
    assert names["vector"].metadata["task"] == "aft_demo_choice"  # type: ignore[attr-defined]
    assert all(not block._forward_hooks for block in model.modules())  # type: ignore[attr-defined]
    # The page on files knows every entry of the vector's header.
    known = set(re.findall(r"`([a-z_]+)`", (ROOT / "docs/formats.md").read_text()))
    assert names["vector"].header().keys() - known == set()  # type: ignore[attr-defined]


# Pages from the first block to the last.

STAND_INS = {
    r"EleutherAI/pythia-160m|MODEL|SMOLLM2|models/smollm2-135m-instruct(/gguf/model\.gguf)?": "demo",
    r"arc_challenge|arc_easy|TASK": "aft_demo_choice",
    r"hellaswag|gsm8k": "aft_demo_math",
}
# What does not run there, by what it begins with or holds, and what runs instead.
NOT_RUN = {
    "make ": "run by .ci/run, and by hand",
    "source ": "changes the shell",
    "accelerate launch": "tests/training trains in two processes",
    "python scripts/": "takes from minutes to hours",
    "aft bench scripts/": "takes hours; docs/study-files.md has a small one",
    "aft vectors train-set scripts/": "needs data sets from the Hub; docs/study-files.md has a small one",
    "aft vectors pull": "tests/library/test_hub.py has a Hub of its own",
    "--strategy optuna": "needs an optional package",
}
FEW = ["--train-docs", "16", "--selection-docs", "16", "--layers", "1,2"]
FEW_SCORED = ["--limit", "4"]


def stand_in(line: str) -> str:
    """A command with the demo model, its tasks, and a processor in place of a GPU."""
    for pattern, ours in STAND_INS.items():
        line = re.sub(rf"(?<![\w/.])(?:{pattern})(?![\w/])", ours, line)
    line = re.sub(
        r"(aft_demo_\w+)((?:,aft_demo_\w+)+)", lambda m: ",".join(dict.fromkeys(m[0].split(","))), line
    )
    return line.replace("--device cuda", "--device cpu")


def run(words: list[str]) -> None:
    """Run a command of a page, on few documents."""
    own = words[words.index("--") + 1 :] if "--" in words else []
    words = words[: -len(own) - 1] if own else words
    match words:
        case ["aft", "eval" | "transfer" as name, *_]:
            words = [*words, *(FEW if name == "transfer" else ()), "--", *own, *FEW_SCORED]
        case ["train-vector", *_] | ["aft", "train" | "search", *_]:
            words = [*words, *FEW]
        case ["lm_eval", *rest]:
            ours = ["--include_path", str(tasks_path())]  # in the place of "$(aft tasks-path)" too
            words = ["aft", "lm-eval", "run", *rest, *ours, *FEW_SCORED, "--device", "cpu"]
    command = train_vector if words[0] == "train-vector" else aft
    outcome = CliRunner().invoke(command, words[1:])
    assert outcome.exit_code == 0, f"{shlex.join(words)}\n{outcome.output}\n{outcome.exception!r}"


def skipped(line: str) -> str:
    """The reason for not running a command, or ``""``."""
    return next((each for each in NOT_RUN if line.startswith(each) or (each[0] == "-" and each in line)), "")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFT_LIBRARY", str(tmp_path / "library"))
    Path("scripts").symlink_to(ROOT / "scripts")
    if page.name == "own-task.md":
        pytest.skip("test_own_task_in_five_minutes runs it")
    vector = Path("runs/arc")
    for block in blocks(page):
        if named := re.match(r"# (\S+\.yaml)\n", block.text):
            Path(named[1]).write_text(block.text)
        if block.language == "python":
            exec(compile(block.text, page.name, "exec"), {"tensor": torch.zeros(8)})
        for words in commands(block) if block.language == "sh" else ():
            line = stand_in(shlex.join(words))
            if f"={vector}" in line and not vector.exists():
                run(["train-vector", "--model", "demo", "--task", "aft_demo_choice", "--output", str(vector)])
            if not skipped(shlex.join(words)):
                run(shlex.split(line))


def test_what_is_not_run_is_there() -> None:
    lines = [
        shlex.join(each) for page in PAGES for b in blocks(page) if b.language == "sh" for each in commands(b)
    ]
    assert set(map(skipped, lines)) == {"", *NOT_RUN}


def shape(line: str) -> str:
    """A line of output without its numbers."""
    return re.sub(r"\s+", " ", re.sub(r"(< )?[-+−±]?\d[\d,.]*", "#", line)).strip()


@pytest.mark.slow
def test_outputs_in_the_readme_are_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    shown = blocks(README)
    pairs = [(a, b) for a, b in itertools.pairwise(shown) if b.language == "text"]
    assert len(pairs) == 2
    for command, output in pairs:
        ((name, *arguments),) = commands(command)
        outcome = CliRunner().invoke(train_vector if name == "train-vector" else aft, arguments)
        assert outcome.exit_code == 0, outcome.output
        printed = set(map(shape, outcome.stdout.splitlines()))
        assert [line for line in output.text.splitlines() if shape(line) not in printed] == []


# Nothing is left out.


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200
    assert README.stat().st_size <= 14 * 1024


def test_every_page_is_in_the_sites_menu() -> None:
    def files(entry: object) -> Iterator[str]:
        for each in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from files(each)
        if isinstance(entry, str):
            yield entry

    menu = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(menu) == [page.name for page in DOCS]


def test_figures_of_speed_are_those_measured() -> None:
    told, measured = ((ROOT / f"docs/{name}.md").read_text() for name in ("speed", "benchmarks"))
    figures = set(re.findall(r"[\d.]+×", told))
    assert len(figures) > 20
    assert figures - set(re.findall(r"[\d.]+×", measured)) == set()


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("README.md", {f"aft {name}" for name in aft.commands} - {"aft tasks-path"}),
        ("docs/commands.md", {f"{name}=" for name in OWN} - {"device="}),
        ("docs/protocols.md", set(PROTOCOLS)),
        ("docs/vector.md", set(METHODS)),
        (
            "docs/study-files.md",
            {
                field.alias or name
                for model in (BenchStudy, ModelEntry, TaskEntry, MethodEntry, Evaluation)
                for name, field in model.model_fields.items()
            }
            - {"settings"},
        ),
        (
            "docs/study-files.md",
            {name for model in (LibraryStudy, VectorDefaults, CrossScores) for name in model.model_fields}
            - {"settings"},
        ),
    ],
)
def test_pages_name_everything(page: str, names: set[str]) -> None:
    told = set(re.findall(r"`([^`\n]+)`", (ROOT / page).read_text()))
    assert names - told == set()
