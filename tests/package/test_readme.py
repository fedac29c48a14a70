"""What the README shows runs as it stands there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lm_eval_aft import load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.cli.train import train_vector

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(section: str) -> list[tuple[str, str]]:
    """(Language, text) of the code blocks of a section, in order."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)


def test_own_task_in_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (_, definition), (_, lines), (_, commands), *_ = blocks("Your own task")
    file = Path(definition.splitlines()[0].removeprefix("# "))
    file.parent.mkdir()
    file.write_text(definition)
    documents = [json.loads(line) for line in lines.splitlines()]
    (file.parent / "train.jsonl").write_text(lines)
    others = [{**document, "question": document["question"] + " Really?"} for document in documents]
    (file.parent / "test.jsonl").write_text("".join(json.dumps(document) + "\n" for document in others))
    said = []
    for command in commands.splitlines():
        name, *arguments = shlex.split(command)
        outcome = CliRunner().invoke(train_vector if name == "train-vector" else aft, arguments)
        assert outcome.exit_code == 0, f"{command}\n{outcome.output}"
        said.append(outcome.output)
    assert "colours" in said[0]
    assert load_vector("colours").metadata["task"] == "colours"
    assert "colours" in said[3]


def test_python_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ((language, code),) = blocks("From Python")
    assert language == "python"
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "aft_demo_choice" in printed
    model, inputs, steered = names["model"], names["inputs"], names["steered"]
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)  # type: ignore[attr-defined, arg-type]
    assert plain.shape[0] == 1
    assert isinstance(steered, torch.Tensor)
    assert names["vector"].metadata["task"] == "aft_demo_choice"  # type: ignore[attr-defined]
    assert all(not block._forward_hooks for block in model.modules())  # type: ignore[attr-defined]
