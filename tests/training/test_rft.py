"""Rejection-sampling fine-tuning on a toy task that random models sometimes solve, and on the demo."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
from click.testing import CliRunner
from lm_eval.api.instance import Instance

from lm_eval_aft import AFTError, SteeringVector, load_vector, train_vector
from lm_eval_aft.cli.train import train_vector as command
from lm_eval_aft.harness.grading import Marker, SolveRates, read_solutions
from lm_eval_aft.harness.tasks import load_task, tasks_path
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.training import checkpoint as events_module
from lm_eval_aft.training import rft as author_module
from lm_eval_aft.training import rft as rft_module
from lm_eval_aft.training.rft import Sampler
from tests.support.processes import by_one_and_by_two
from tests.training.test_train import events

# A random model says "cat" now and then.
WORDS_YAML = """\
include: toy_generate.yaml
task: toy_words
doc_to_target: cat
generation_kwargs:
  until: ["Question"]
  do_sample: false
  max_gen_toks: 3
filter_list:
  - name: first-animal
    filter:
      - function: regex
        regex_pattern: "(cat|dog)"
      - function: take_first
  - name: last-animal
    filter:
      - function: regex
        regex_pattern: "(cat|dog)"
        group_select: -1
      - function: take_first
"""


@pytest.fixture
def words(toy_tasks: Callable[..., str]) -> str:
    """Folder with ``toy_words``."""
    folder = toy_tasks()
    (Path(folder) / "toy_words.yaml").write_text(WORDS_YAML)
    return folder


@pytest.fixture
def settings(words: str) -> dict[str, Any]:
    return {
        "include_path": (words,),
        "objective": "rft",
        "rft_samples": 12,
        "rft_rounds": 3,
        "rft_temperature": 3.0,
        "protocol": "maximum",
        "layers": "1-2",
        "seeds": 2,
        "first_seed": 2,
        "train_docs": 16,
        "selection_docs": 16,
        "lr": 0.1,
        "l2": 0.0,
        "epochs": 4,
        "batch_size": 4,
        "regression": False,
        "retries": 0,
        "progress": False,
    }


@pytest.fixture
def rising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds judged by their samples: greedy decoding of a random model hardly ever changes."""

    def judge(solutions: Any) -> SolveRates:
        standing = SolveRates.of(solutions)
        return replace(standing, greedy=standing.pass_at["1"])

    monkeypatch.setattr(rft_module, "SolveRates", SimpleNamespace(of=judge))


@pytest.fixture
def lm(checkpoint: Callable[..., str]) -> AFTLM:
    return AFTLM(checkpoint("llama"), device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def demo() -> AFTLM:
    return AFTLM("demo", device="cpu", batch_size=16)


def comparable(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "time"} for e in events(folder)]


def test_rounds_of_one_pass(lm: AFTLM, settings: dict[str, Any], tmp_path: Path, rising: None) -> None:
    for name in ("lr", "l2", "epochs", "batch_size", "regression", "retries"):
        settings.pop(name)
    meta = train_vector(
        lm, "toy_words", tmp_path / "out", **settings | {"protocol": "onepass"}
    ).vector.metadata
    assert meta["protocol"]["name"] == "onepass"
    assert len(meta["rft"]["table"]) > 1
    assert meta["protocol"]["trials"] > 2


def test_rounds_are_recorded_and_the_best_is_kept(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path, rising: None
) -> None:
    folder = tmp_path / "out"
    result = train_vector(lm, "toy_words", folder, **settings)
    assert lm.vector is None
    meta = result.vector.metadata
    rft = meta["rft"]
    assert (meta["objective"], rft["samples"], rft["rounds"], rft["temperature"]) == ("rft", 12, 3, 3.0)
    assert (rft["filter"], rft["metric"]) == ("first-animal", "exact_match")
    table = rft["table"]
    # The first best greedy score wins; the run ends at the first round that is no better, or at the last.
    greedy = [line["greedy"] for line in table]
    assert rft["best_round"] == greedy.index(max(greedy))
    assert all(later > earlier for earlier, later in pairwise(greedy[:-1]))
    assert len(table) > 2
    assert len(table) == 4 or greedy[-1] <= max(greedy[:-1])
    # What the vector is, is what the best round's folder holds.
    trained = load_vector(folder / "rounds" / str(max(rft["best_round"], 1)))
    assert torch.equal(*(next(iter(v.layers.values())) for v in (trained, load_vector(folder))))
    assert sorted(result.finalists) == [2, 3]
    assert load_vector(folder / "seeds" / "seed-3.safetensors").metadata["rft"] == rft
    # Counts agree with the files, and marks with the texts in them.
    lines = {(e["event"], e.get("round")): e for e in events(folder)}
    for number in range(1, len(table)):
        written = read_solutions(folder / f"rft-round-{number}.jsonl")
        kept = {(s.doc_id, s.text.strip()) for s in written if s.right}
        said = lines["sampled", number]
        assert (said["tried"], said["right"]) == (16 * 12, sum(s.right for s in written))
        assert (said["kept"], table[number]["kept"]) == (len(kept), len(kept))
        assert load_vector(folder / "rounds" / str(number)).metadata["splits"]["train"] == len(kept)
    answers = read_solutions(folder / "rft-selection-0.jsonl")
    sampled = [s.right for s in answers if not s.greedy]
    assert table[0]["pass_at"]["1"] == pytest.approx(sum(sampled) / len(sampled))
    assert not (folder / "state.safetensors").exists()
    assert "## Rounds" in (folder / "README.md").read_text()


def test_marks_are_the_harness_s_own(demo: AFTLM) -> None:
    """The same generations, marked by an ordinary lm-eval run and by us, for both filters."""
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks_path()), include_defaults=False)
    run = lm_eval.simple_evaluate(
        demo, tasks=["aft_demo_math"], task_manager=manager, limit=40, log_samples=True, bootstrap_iters=0
    )
    task = load_task("aft_demo_math")
    for name in ("strict-match", "flexible-extract"):
        logged = [s for s in run["samples"]["aft_demo_math"] if s["filter"] == name]
        marker = Marker(task, name)
        found = marker.marks([s["doc"] for s in logged], [s["resps"][0][0] for s in logged])
        assert found == [s["exact_match"] == 1 for s in logged]
        assert 0 < sum(found) < 40
    # Text that only one of the filters reads.
    doc = {"question": "?", "answer": "#### 90"}
    texts = [" 90", " #### 90", " 89, no: 90", " #### 89", "", " #### 90 #### 1"]
    assert Marker(task).marks([doc] * 6, texts) == [False, True, False, False, False, True]
    assert Marker(task, "flexible-extract").marks([doc] * 6, texts)[:4] == [True, True, True, False]


def test_a_grade_is_no_mark(demo: AFTLM) -> None:
    task = load_task("aft_demo_math")
    task.process_results = lambda doc, results: {"exact_match": 0.5}
    with pytest.raises(AFTError, match="gave 0.5 for one answer"):
        Marker(task).marks([{}], ["x"])
    with pytest.raises(AFTError, match="has no filter 'loose'"):
        Marker(task, "loose")
    with pytest.raises(AFTError, match="has no metric 'f1'"):
        Marker(task, None, "f1")


def demo_prompts(n: int) -> tuple[list[str], dict[str, Any]]:
    task = load_task("aft_demo_math")
    docs = list(task.training_docs())[:n]
    return [str(task.doc_to_text(doc)) for doc in docs], dict(task.config.generation_kwargs)


@pytest.mark.parametrize("steer", [False, True])
def test_cold_sampling_is_greedy_decoding(demo: AFTLM, steer: bool) -> None:
    """At a temperature near 0, prompts of mixed lengths in one batch give the harness's own texts."""
    contexts, kwargs = demo_prompts(24)
    values = torch.randn(128, generator=torch.Generator().manual_seed(0)) * 0.1
    vector = SteeringVector({2: values}) if steer else None
    sampler = Sampler(demo, kwargs, progress=False)
    cold = sampler.sample(vector, contexts, 2, 1e-4, "0")
    assert cold == [[text, text] for text in sampler.greedy(vector, contexts)]
    demo.steer(vector)
    requests = [Instance("generate_until", {}, (context, dict(kwargs)), 0) for context in contexts]
    assert [texts[0] for texts in cold] == demo.generate_until(requests, disable_tqdm=True)
    demo.steer(None)


def test_a_seed_fixes_the_samples(lm: AFTLM) -> None:
    kwargs = {"until": ["dog", "cat sees"], "max_gen_toks": 12}
    sampler = Sampler(lm, kwargs, progress=False)
    contexts = ["the cat", "one two three", "Answer :", "the cat"]
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one = sampler.sample(None, contexts, 5, 2.0, "a")
    assert torch.equal(before, torch.random.get_rng_state())
    assert one == sampler.sample(None, contexts, 5, 2.0, "a")
    assert one != sampler.sample(None, contexts, 5, 2.0, "b")
    assert one[0] != one[3]  # equal prompts draw on their own
    assert len({text for texts in one for text in texts}) > 5
    assert not any(stop in text for texts in one for text in texts for stop in kwargs["until"])


def test_small_batches_lose_nothing(lm: AFTLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval_aft.training.rft.MOST_ROWS", 3)
    contexts = ["the cat", "one two three four", "Answer :"]
    sampler = Sampler(lm, {"until": ["Question"], "max_gen_toks": 6}, progress=False)
    cold = sampler.sample(None, contexts, 4, 1e-4, "a")
    assert cold == [[text] * 4 for text in sampler.greedy(None, contexts)]


def test_prompts_that_leave_no_room_are_refused(lm: AFTLM) -> None:
    with pytest.raises(AFTError, match="context holds 128"):
        Sampler(lm, {"until": [], "max_gen_toks": 128})


def test_interrupted_anywhere_it_resumes_to_the_same_vector(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rising: None
) -> None:
    settings |= {"rft_rounds": 2, "seeds": 1, "layers": "1", "epochs": 1}
    whole = train_vector(lm, "toy_words", tmp_path / "whole", **settings)

    def breaking(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> None:
            original(*arguments, **options)
            raise KeyboardInterrupt  # after every single thing that is kept

        return wrapped

    places = [(events_module, "save_state"), (rft_module, "save_state"), (author_module, "write_solutions")]
    for module, name in places:
        monkeypatch.setattr(module, name, breaking(getattr(module, name)))
    interruptions = 0
    while True:
        try:
            resumed = train_vector(lm, "toy_words", tmp_path / "broken", resume=True, **settings)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 8
    assert resumed.vector.digest() == whole.vector.digest()
    assert resumed.vector.metadata["rft"] == whole.vector.metadata["rft"]
    assert comparable(tmp_path / "broken") == comparable(tmp_path / "whole")
    with pytest.raises(AFTError, match="finished"):
        train_vector(lm, "toy_words", tmp_path / "broken", resume=True, **settings)


@pytest.mark.slow
def test_killed_in_the_middle_it_resumes(
    checkpoint: Callable[..., str], lm: AFTLM, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"seeds": 1, "rft_rounds": 1, "layers": "1", "epochs": 2}
    whole = train_vector(lm, "toy_words", tmp_path / "whole", **settings)
    program = f"""
import os, signal
from lm_eval_aft import train_vector
from lm_eval_aft.training import checkpoint as events
original = events.save_state
def save(*arguments):
    original(*arguments)
    with open({str(tmp_path / "killed" / "training.jsonl")!r}, "a") as ledger:
        ledger.write('{{"event": "rou')  # as if killed in the middle of a line
    os.kill(os.getpid(), signal.SIGKILL)
events.save_state = save
train_vector({checkpoint("llama")!r}, "toy_words", {str(tmp_path / "killed")!r},
             model_args={{"device": "cpu", "batch_size": 4}}, **{settings!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    resumed = train_vector(lm, "toy_words", tmp_path / "killed", resume=True, **settings)
    assert resumed.vector.digest() == whole.vector.digest()
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")


def test_a_model_that_is_never_right_is_told_so(
    checkpoint: Callable[..., str], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    arguments = [
        *("--model", checkpoint("llama"), "--task", "toy_generate", "--include-path", words),
        *("--objective", "rft", "--rft-samples", "3", "--train-docs", "10", "--selection-docs", "10"),
        *("--device", "cpu", "--output", str(folder)),
    ]
    outcome = CliRunner().invoke(command, arguments)
    assert outcome.exit_code == 1
    assert "none of 30 sampled solutions (10 problems x 3 samples, temperature 0.7)" in outcome.output
    assert "can only strengthen what the model sometimes does" in outcome.output
    assert "--rft-samples" in outcome.output
    assert "--objective lm" in outcome.output
    assert "Traceback" not in outcome.output
    found = {path.name for path in folder.rglob("*")}
    assert found == {"training.jsonl", "state.safetensors", "rft-round-1.jsonl"}
    assert events(folder)[-1]["kept"] == 0
    assert len(read_solutions(folder / "rft-round-1.jsonl")) == 30


def test_tasks_and_settings_that_do_not_fit_are_refused(lm: AFTLM, settings: dict[str, Any]) -> None:
    for task, change, message in (
        ("toy_choice", {}, "it has none to generate"),
        ("toy_words", {"rft_filter": "loose"}, "first-animal, last-animal"),
        ("toy_words", {"metric": "acc"}, "exact_match"),
        ("toy_words", {"control": "format"}, "uses 'rft'"),
    ):
        with pytest.raises(AFTError, match=message):
            train_vector(lm, task, **{**settings, **change})


def test_the_random_control_replaces_the_finished_vector(lm: AFTLM, settings: dict[str, Any]) -> None:
    settings |= {"rft_rounds": 1, "seeds": 1, "layers": "1"}
    real, placebo = (train_vector(lm, "toy_words", control=c, **settings).vector for c in (None, "random"))
    assert placebo.norm() == pytest.approx(real.norm(), rel=1e-5)
    assert placebo.digest() != real.digest()
    assert placebo.metadata["control"] == "random"
    assert placebo.metadata["rft"]["table"] == real.metadata["rft"]["table"]


@pytest.mark.slow
def test_two_processes_find_the_same_vector_as_one(
    checkpoint: Callable[..., str], words: str, tmp_path: Path
) -> None:
    arguments = [
        *("--model", checkpoint("llama"), "--task", "toy_words", "--include-path", words),
        *("--objective", "rft", "--rft-samples", "12", "--rft-rounds", "2", "--rft-temperature", "3"),
        *("--protocol", "maximum", "--layers", "1-2", "--train-docs", "16", "--selection-docs", "16"),
        *("--epochs", "2", "--seeds", "2", "--lr", "0.1", "--batch-size", "4", "--device", "cpu"),
    ]
    one, two = by_one_and_by_two(arguments, tmp_path)
    assert two.metadata["rft"] == one.metadata["rft"]
    for name in ("rft-round-1.jsonl", "rft-selection-1.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_the_demo_learns_from_its_own_right_answers(demo: AFTLM, tmp_path: Path) -> None:
    result = train_vector(
        demo,
        "aft_demo_math",
        tmp_path / "out",
        objective="rft",
        protocol="optimized",
        layers="2-3",
        rft_samples=4,
        rft_rounds=1,
        train_docs=60,
        selection_docs=60,
        lr=1e-2,
        epochs=3,
        batch_size=4,
        progress=False,
    )
    baseline, after = (line["greedy"] for line in result.vector.metadata["rft"]["table"])
    assert baseline < 0.7 < 0.9 < after
    lines = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").open()]
    assert lines[-1]["event"] == "chosen"
