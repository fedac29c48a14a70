"""Commands that reports print are run: the same questions are asked, and the same answers given."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from lm_eval._cli.harness import HarnessCLI
from transformers import AutoTokenizer

from lm_eval_aft import SteeringVector
from lm_eval_aft.cli.options import parse_model_args
from lm_eval_aft.cli.train import plan_settings, train_vector
from lm_eval_aft.evaluation.provenance import commands, read_vector_info, training_command
from lm_eval_aft.evaluation.report import _run_warnings
from lm_eval_aft.evaluation.results import ScoredRun, TaskRun, read_run
from lm_eval_aft.evaluation.run import evaluate_pair
from lm_eval_aft.harness.examples import PromptSettings
from lm_eval_aft.training.recipe import TrainingPlan
from tests.support.families import tiny_model, tiny_tokenizer

SHORT = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"
MADE = """\
task: made
custom_dataset: !function utils.sized
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} ?"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1, author: nobody}
"""
UTILS = """\
from datasets import Dataset, DatasetDict


def sized(size, **_):
    documents = [{"question": "cat", "choices": ["red", "blue"], "gold": i % 2} for i in range(size)]
    return DatasetDict({"test": Dataset.from_list(documents)})
"""


@pytest.fixture
def place(toy_tasks: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``tasks``, ``v``, a model in ``hub/sub``, an ``adapter`` for it; and no index of thousands of tasks."""
    from peft import LoraConfig, get_peft_model

    toy_tasks()
    (tmp_path / "tasks" / "both.yaml").write_text("group: both\ntask: [toy_choice, toy_generate]\n")
    (tmp_path / "tasks" / "made.yaml").write_text(MADE)
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "short": SHORT}
    model.save_pretrained(tmp_path / "hub" / "sub")
    tokenizer.save_pretrained(tmp_path / "hub" / "sub")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    SteeringVector({1: torch.randn(32)}).save(tmp_path / "v")

    class Small(lm_eval.tasks.TaskManager):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**{**settings, "include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_lm_eval(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    harness = HarnessCLI()
    harness.execute(harness.parse_args())


def run_again(run: ScoredRun, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Carry out the run's printed commands; questions and answers must be those of the run."""
    lines = commands(run)
    for number, line in enumerate(lines):
        words = shlex.split(line)
        words[words.index("--output_path") + 1] = str(folder / str(number))
        assert words[0] == "lm_eval"
        run_lm_eval(words[1:], monkeypatch)
    again = {task: each for i in range(len(lines)) for task, each in read_run(folder / str(i)).tasks.items()}
    assert again.keys() == run.tasks.keys()
    for task, each in run.tasks.items():
        assert logged(again[task]) == logged(each)


def logged(run: TaskRun) -> list[Any]:
    lines = map(json.loads, run.samples_file.read_text().splitlines())
    return [[line[key] for key in ("doc_id", "doc_hash", "arguments", "resps", "filter")] for line in lines]


MODEL = "pretrained=hub,subfolder=sub"
MORE = f"{MODEL},peft=adapter,dtype=float64,max_length=60,add_bos_token=true,prefix_token_id=3"
PROMPTS = ["--num_fewshot", "2", "--system_instruction", "small, 'red' \n and $HOME", "--seed", "1,2,3,4"]
ASKED = [
    ["--tasks", "toy_choice,toy_generate", "--limit", "3", "--apply_chat_template", *PROMPTS],
    ["--tasks", "toy_generate", "--limit", "0.2", "--gen_kwargs", "max_gen_toks=3,until=cat"],
    ["--tasks", "made", "--metadata", '{"size": 4}'],
]


@pytest.mark.parametrize("model", ["hf", "aft"])
@pytest.mark.parametrize(("arguments", "asked"), [(MODEL, ASKED[0]), (MORE, ASKED[1]), (MODEL, ASKED[2])])
def test_of_runs_by_lm_eval(
    place: Path, monkeypatch: pytest.MonkeyPatch, model: str, arguments: str, asked: list[str]
) -> None:
    arguments += ",vector=v,allow_mismatch=true" if model == "aft" else ""
    words = ["--model", model, "--model_args", arguments, *asked, "--include_path", "tasks"]
    run_lm_eval([*words, "--device", "cpu", "--log_samples", "--output_path", "first"], monkeypatch)
    run_again(read_run("first"), place / "again", monkeypatch)


EVALUATED = [
    (
        ["both"],
        ["--limit", "4", "--apply_chat_template", "short", "--fewshot_as_multiturn", "false", *PROMPTS],
    ),
    (["toy_c*"], ["--samples", '{"toy_choice": [1, 5]}']),
    (["tasks/made.yaml"], ["--metadata", '{"size": 4}']),
]


@pytest.mark.parametrize(("tasks", "flags"), EVALUATED)
def test_of_runs_by_aft_eval(
    place: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[str], flags: list[str]
) -> None:
    arguments = {"subfolder": "sub", "device": "cpu", "peft": "adapter"}
    flags = [*flags, *(["--include_path", "tasks"] if "/" not in tasks[0] else [])]
    more = {**arguments, "allow_mismatch": True}
    evaluate_pair("hub", "v", tasks, "first", model_args=more, flags=flags)
    for name in ("baseline", "steered/v"):
        run_again(read_run(place / "first" / name), place / "again" / name, monkeypatch)


def test_prompts_that_differ_from_training(place: Path) -> None:
    """Every setting of the prompts is compared with those of the vector's training."""
    template = AutoTokenizer.from_pretrained("hub/sub").chat_template["default"]
    prompts = {"num_fewshot": 1, "system_instruction": "Be small .", "apply_chat_template": True}
    SteeringVector({1: torch.ones(32)}, metadata={"prompts": prompts, "chat_template": "0" * 64}).save("v")
    flags = ["--include_path", "tasks", "--limit", "2", "--num_fewshot", "1"]
    chat = ["--apply_chat_template", "default", "--system_instruction", "Be small ."]
    notes = {}
    for name, more in (("plain", []), ("chat", chat), ("text", [*chat, "--fewshot_as_multiturn", "false"])):
        arguments = {"subfolder": "sub", "device": "cpu"}
        evaluate_pair("hub", "v", ["toy_choice"], name, model_args=arguments, flags=[*flags, *more])
        base, run = (read_run(place / name / each) for each in ("baseline", "steered/v"))
        notes[name] = "; ".join(_run_warnings(base, run, read_vector_info(run)))
    assert (
        "trained with the system instruction 'Be small .', scored with no system instruction"
        in notes["plain"]
    )
    assert "trained with the chat template '00000000', scored with no chat template" in notes["plain"]
    assert "system instruction" not in notes["chat"]
    assert "trained with the chat template '00000000', scored with the chat template" in notes["chat"]
    assert "chat turns" not in notes["chat"]
    assert "chat turns, scored with few-shot examples as one text" in notes["text"]
    assert template != SHORT


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "arc_easy"},
        {
            "task": ["a", "b"],
            "protocol": "rapid",
            "lr": [1e-2, 1e-3],
            "patience": None,
            "regression": False,
            "prompts": PromptSettings(
                num_fewshot=2,
                apply_chat_template=True,
                system_instruction="small, or 'red'",
                fewshot_as_multiturn=False,
            ),
            "include_path": ["p", "q"],
            "calibrate": True,
            "screen": "order",
            "first_seed": 3,
        },
        {"task": "gsm8k", "objective": "rft", "rft_samples": 4, "positions": "last", "norm_cap": 0.5},
    ],
)
def test_the_call_that_trains_again(settings: dict[str, Any]) -> None:
    """Read by the command itself, it gives the same plan and the same model arguments."""
    plan = TrainingPlan.of(**settings)
    arguments = {"dtype": "bfloat16", "gguf_file": "a, b.gguf", "revision": "1234"}
    line = training_command(plan.to_dict(), {"base_model": {"name": "some/model", "args": arguments}})
    options = dict(train_vector.make_context("train", shlex.split(line)[2:]).params)
    assert (options.pop("model"), options.pop("output")) == ("some/model", Path("VECTOR"))
    assert parse_model_args(options.pop("model_args")) == arguments
    for name in ("device", "dtype", "resume", "overwrite", "dry_run", "log"):
        del options[name]
    assert TrainingPlan.of(**plan_settings(options)) == plan
