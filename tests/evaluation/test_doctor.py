"""`aft doctor`: what it says of right answers, of wrong ones and of errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from lm_eval_aft import AFTError
from lm_eval_aft._util.private_names import NAMES
from lm_eval_aft.cli.main import aft
from lm_eval_aft.evaluation import doctor as evaluation_doctor
from lm_eval_aft.evaluation import self_check
from lm_eval_aft.evaluation.doctor import Diagnosis
from lm_eval_aft.evaluation.self_check import (
    BROKEN,
    FAMILIES,
    REFUSED,
    RIGHT,
    SLOWER,
    WRONG,
    Outcome,
    Trial,
    tiny_model,
    tokenizer,
    try_family,
)
from lm_eval_aft.steering.intervention import POSITIONS


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(aft, ["doctor", *arguments])


def verdicts(trial: Trial) -> dict[tuple[str, str], str]:
    """The worst verdict on each part."""
    order = [RIGHT, SLOWER, REFUSED, BROKEN, WRONG]
    found: dict[tuple[str, str], str] = {}
    for each in trial.outcomes:
        key = (each.part, each.positions)
        found[key] = max(found.get(key, RIGHT), each.verdict, key=order.index)
    return found


@pytest.fixture
def without_a_second_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lm_eval_aft.evaluation.doctor.registration", lambda: {"fresh interpreter": "not asked"}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_right(family: str) -> None:
    trial = try_family(family)
    assert not trial.absent
    assert not [each for each in trial.outcomes if each.bad]
    found = verdicts(trial)
    assert {positions for part, positions in found if part == "log-likelihoods"} == {"", *POSITIONS}
    for part in ("generation", "stock", "by hand"):
        assert {positions for each, positions in found if each == part} == {"", *POSITIONS}
    packed = family not in ("mamba", "gemma3", "mistral (window)")
    assert found["prefixed", ""] == (RIGHT if packed else SLOWER)
    assert found["trimmed", ""] == found["resumed", ""] == RIGHT
    assert all(each.why for each in trial.outcomes if each.verdict != RIGHT)


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_shows_in_what_is_compared(family: str) -> None:
    """Otherwise a vector that does nothing would pass."""
    subject = self_check._Subject(Trial(family), tiny_model(family), "cpu")
    pairs, prompts = self_check._questions(), self_check._prompts()
    for positions in POSITIONS:
        steered, plain = (subject._wanted(pairs, each) for each in (positions, ""))
        assert max(abs(a - b) for a, b in zip(steered, plain, strict=True)) > 100 * self_check.BAR
        texts = [[subject._plain(prompt, each)[0] for prompt in prompts] for each in (positions, "")]
        assert texts[0] != texts[1], positions


def test_the_command_says_all_of_it(without_a_second_interpreter: None) -> None:
    outcome = doctor("--family", "gpt2")
    assert (outcome.exit_code, "WRONG" in outcome.stdout) in ((0, False), (1, True))
    for told in ("versions", "transformers", "machine", "processor", "registration", "private names"):
        assert told in outcome.stdout
    assert f"{len(NAMES)} of {len(NAMES)} as needed" in outcome.stdout
    assert "prefixed packed trimmed resumed" in outcome.stdout
    assert "gpt2 (1 of 1)" in outcome.stderr
    assert "gpt2 (1 of 1)" not in outcome.stdout


def test_a_sabotage_is_told_and_ends_with_1(
    without_a_second_interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval_aft.steering import hooks

    add_at = hooks.add_at
    monkeypatch.setattr(
        hooks, "add_at", lambda block, shift: add_at(block, 2 * shift if torch.is_tensor(shift) else shift)
    )
    outcome = doctor("--family", "llama", "--json")
    assert outcome.exit_code == 1
    found = json.loads(outcome.stdout)
    (trial,) = found["trials"]
    wrong = {(o["part"], o["positions"]) for o in trial["outcomes"] if o["verdict"] == WRONG}
    assert {("log-likelihoods", "all"), ("stock", "all"), ("by hand", "all")} <= wrong
    assert found["wrong"] >= len(wrong)
    assert found["versions"]["lm-eval"]
    told = doctor("--family", "llama").stdout
    assert "instead of" in told
    assert "do not trust" in told


def test_errors_are_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AFTError("This cannot be.", "Do something else.")

    def break_down(*_: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(self_check._Subject, "_fast", refuse)
    monkeypatch.setattr(self_check._Subject, "_stock", break_down)
    trial = try_family("gpt2")
    found = verdicts(trial)
    assert found["generation", "all"] == REFUSED
    assert found["stock", "all"] == BROKEN
    told = str(Diagnosis({"a": "1"}, {"b": "2"}, {"c": "3"}, trials=[trial]))
    assert "This cannot be. Do something else." in told
    assert "KeyError: 'oops'" in told
    assert [each for each in trial.outcomes if each.part == "generation" and each.bad] == []


def test_a_family_that_is_not_there_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "new", ("NoSuchConfig", {}))
    trial = try_family("new")
    assert "NoSuchConfig" in trial.absent
    report = Diagnosis({"a": "1"}, {"b": "2"}, {"c": "3"}, trials=[trial])
    assert not report.bad
    assert "new: not tried, transformers has no NoSuchConfig" in str(report)


def test_a_name_that_is_gone_is_told_and_no_fault(
    without_a_second_interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "_encode_pair", lambda *_: None)
    monkeypatch.setattr(
        "lm_eval_aft.evaluation.doctor.try_family", lambda family, _: Trial(family, [Outcome("x", RIGHT)])
    )
    outcome = doctor("--family", "llama")
    assert outcome.exit_code == 0
    assert "lm-eval: HFLM._encode_pair" in outcome.stdout
    assert "without it: an error when training" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--family", "elephant"], "'elephant' is not known"), (["--device", "tpu"], "no device 'tpu'")],
)
def test_bad_input(arguments: list[str], told: str) -> None:
    outcome = doctor(*arguments)
    assert outcome.exit_code == 1
    assert told in outcome.output


def test_ties_are_not_wrong() -> None:
    assert self_check._tied([5, 6], [1.0, 1e-5], [5, 7])
    assert not self_check._tied([5, 6], [1e-5, 1.0], [5, 7])
    assert not self_check._tied([5, 6], [1e-5, 1e-5], [5])


def test_the_tokenizer_takes_texts_apart_and_puts_them_together() -> None:
    made = tokenizer()
    text = " ".join(["a", "bb", "z"])
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    assert made.decode(ids) == text


def test_how_lm_eval_comes_to_know_the_model() -> None:
    found = evaluation_doctor.registration()
    assert "lm-eval knows --model aft" in found["fresh interpreter"]


def test_what_is_installed() -> None:
    found = evaluation_doctor.versions()
    assert found["torch"] == torch.__version__
    assert found["python"]
    assert "float32" in evaluation_doctor.machine()["dtypes on cpu"]
