"""Printed commands: lm-eval's own parser reads back from them what was put in."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from lm_eval._cli.harness import HarnessCLI

from lm_eval_aft.cli.evaluate import evaluate
from lm_eval_aft.cli.options import parse_model_args
from lm_eval_aft.harness.commands import lm_eval_command, task_words, vector_command
from lm_eval_aft.harness.tasks import tasks_path

# One or more values of each setting; texts that lm-eval would turn into numbers or split among them.
MODEL_ARGS: list[dict[str, Any]] = [
    {"dtype": "bfloat16", "revision": "main"},
    {"revision": "1234567"},
    {"revision": "0x12"},
    {"revision": "None"},
    {"gguf_file": "a model, quantised.gguf"},
    {"peft": "a/peft", "subfolder": "sub", "trust_remote_code": True, "max_length": 64},
    {"max_memory": {"0": "1GB"}, "use_fast_tokenizer": False},
    {"tokenizer": "it's", "prefix_token_id": None, "softmax_dtype": "float32", "think_end_token": "</think>"},
]
SETTINGS: list[dict[str, Any]] = [
    {"num_fewshot": 0, "limit": 3.0, "seed": [0, None, 2, 3]},
    {"limit": 0.25, "batch_size": "auto:4"},
    {"system_instruction": 'Say "yes",\nor $HOME; - nothing else'},
    {"system_instruction": "-short"},
    {"apply_chat_template": True, "fewshot_as_multiturn": False},
    {"apply_chat_template": "tool_use", "fewshot_as_multiturn": True},
    {"gen_kwargs": {"until": ["\n\n", "Q:"], "temperature": 0.7, "do_sample": True}},
    {"metadata": {"max_seq_lengths": [4096, 8192]}, "include_path": "my tasks"},
    {"samples": {"task": [1, 5]}},
]


def parsed(command: str) -> dict[str, Any]:
    words = shlex.split(command)
    assert words[0] == "lm_eval"
    return vars(HarnessCLI()._parser.parse_args(["run", *words[1:]]))


@pytest.mark.parametrize("arguments", MODEL_ARGS)
def test_model_arguments(arguments: dict[str, Any]) -> None:
    given = {"pretrained": "some/model", **arguments, "vector": "a+b*2"}
    found = parsed(lm_eval_command("aft", given, ["arc", "x_*"], {"num_fewshot": 0}))
    assert (found["model"], found["tasks"], found["num_fewshot"]) == ("aft", ["arc", "x_*"], 0)
    assert found["model_args"] == given
    meta = {"base_model": {"name": "some/model", "args": arguments}, "task": "arc_easy,arc_challenge"}
    words = shlex.split(vector_command(meta, "my vector", "out"))
    options = evaluate.make_context("eval", words[2:]).params
    assert parse_model_args(options["model_args"]) == arguments
    assert (options["model"], options["vectors"]) == ("some/model", ("my vector",))
    assert (options["tasks"], options["output"]) == ("arc_easy,arc_challenge", Path("out"))


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings(settings: dict[str, Any]) -> None:
    found = parsed(lm_eval_command("hf", {"pretrained": "m"}, ["arc"], settings))
    assert {name: found[name] for name in settings} == settings


def test_settings_that_say_nothing_are_left_out() -> None:
    empty = dict.fromkeys(("num_fewshot", "limit", "gen_kwargs", "system_instruction", "metadata"))
    settings = empty | {"gen_kwargs": {}, "apply_chat_template": False}
    assert lm_eval_command("hf", {}, ["arc"], settings) == "lm_eval --model hf --tasks arc"


def test_prompts_of_a_vector(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("task: mine\n")
    meta = {
        "base_model": {"name": "some/model", "revision": "v2"},
        "task": "mine",
        "prompts": {"num_fewshot": 2, "system_instruction": "Be brief.", "apply_chat_template": True},
        "include_path": [str(tmp_path)],
        "task_metadata": {"size": 3},
    }
    found = parsed(vector_command(meta, "FOLDER"))
    assert found["model_args"] == {"pretrained": "some/model", "revision": "v2", "vector": "FOLDER"}
    assert (found["num_fewshot"], found["system_instruction"]) == (2, "Be brief.")
    assert (found["apply_chat_template"], found["metadata"]) == (True, {"size": 3})
    assert found["include_path"] == str(tmp_path)


def test_tasks_of_several_folders() -> None:
    """lm-eval takes one folder: the tasks of a second one are named by their files."""
    sources = {
        "arc_easy": Path("/x/lm_eval/tasks/arc/arc_easy.yaml"),
        "mine": Path("/a/mine.yaml"),
        "other": Path("/b/other.yaml"),
        "unknown": None,
    }
    assert task_words(sources) == (["arc_easy", "mine", "/b/other.yaml", "unknown"], "/a")


def test_our_own_tasks_on_any_machine() -> None:
    command = vector_command({"base_model": {"name": "demo"}, "task": "aft_demo_choice"}, "v")
    assert command.endswith('--tasks aft_demo_choice --include_path "$(aft tasks-path)"')
    assert str(tasks_path()) not in command
    command = vector_command({"base_model": {"name": "demo"}, "task": "aft_demo_choice"}, "v", "out")
    assert command == (
        "aft eval --model demo --vector v --tasks aft_demo_choice --placebo random:3 --output out"
    )
