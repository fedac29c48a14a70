"""Real documents and small trained models: fast answers against stock's, decision by decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from lm_eval_aft.lm import AFTLM

MODELS = ["stories260K", "scratch-demo", "english-neox-12m"]
LEADERBOARD = [("arc_challenge", 25), ("hellaswag", 10)]


def instances(name: str, shots: int, limit: int | None, fixed: bool = False) -> list[Instance]:
    """The harness's own requests for the first documents of a stock task, or with one set of examples."""
    from lm_eval.api.samplers import FirstNSampler
    from lm_eval.tasks import get_task_dict

    from lm_eval_aft.harness.tasks import task_manager_for

    (task,) = get_task_dict([name], task_manager_for([name], [])).values()
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(1234)
    if fixed:
        task.sampler = FirstNSampler(task.sampler.fewshot_docs())
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return list(task.instances)


def decisions(asked: list[Instance], answers: list[tuple[float, bool]], per_byte: bool) -> dict[int, Any]:
    """Document -> (option chosen, margin over the runner-up in nats or nats per character)."""
    scores: dict[int, list[float]] = {}
    for instance, (value, _) in zip(asked, answers, strict=True):
        length = max(1, len(instance.args[1].strip())) if per_byte else 1
        scores.setdefault(instance.doc_id, []).append(value / length)
    return {
        document: (int(np.argmax(values)), float(np.diff(np.sort(values))[-1]))
        for document, values in scores.items()
    }


def compare(folder: Path, name: str, shots: int, limit: int | None) -> dict[str, Any]:
    """Largest difference, and every decision that differs, over a task's documents."""
    asked = instances(name, shots, limit)
    lm = AFTLM(str(folder), device="cpu", batch_size=1)  # the fastest for stock on long rows
    fast = lm.loglikelihood(asked, disable_tqdm=True)
    path = lm.get_model_info()["aft"]["scoring_path"]
    share = float(path.split("packed (")[1].split("%")[0]) / 100 if "packed (" in path else 0.0
    lm.fast = False
    slow = lm.loglikelihood(asked, disable_tqdm=True)
    flips = []
    for per_byte in (False, True):
        ours, stock = (decisions(asked, answers, per_byte) for answers in (fast, slow))
        flips += [
            (document, stock[document]) for document in stock if ours[document][0] != stock[document][0]
        ]
    over = [
        (i, a[0], b[0])
        for i, (a, b) in enumerate(zip(fast, slow, strict=True))
        if abs(a[0] - b[0]) > max(1e-4, 1e-6 * abs(b[0]))
    ]
    return {
        "documents": len(decisions(asked, slow, False)),
        "largest": max(abs(a[0] - b[0]) for a, b in zip(fast, slow, strict=True)),
        "over": over,
        "greedy": sum(a[1] != b[1] for a, b in zip(fast, slow, strict=True)),
        "flips": flips,
        "packed": share,
    }


def check(found: dict[str, Any], least: float = 0.95) -> None:
    print(found)  # pytest -rP shows the figures, and every tie that flips with its margin
    assert not found["over"]
    assert found["greedy"] == 0
    # A tie may fall either way; anything with a margin may not.
    assert all(margin < 1e-5 for _, (_, margin) in found["flips"]), found["flips"]
    assert found["packed"] >= least, found


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", ["arc_challenge", "hellaswag"])
def test_zero_shot_sample(model: str, task: str, test_data: Path) -> None:
    check(compare(test_data / "models" / model, task, 0, 60))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "shots"), LEADERBOARD)
def test_leaderboard_sample(task: str, shots: int, test_data: Path) -> None:
    check(compare(test_data / "models" / "english-neox-12m", task, shots, 4))


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("task", "limit"), [("arc_challenge", None), ("hellaswag", 2000)])
def test_zero_shot(model: str, task: str, limit: int | None, test_data: Path) -> None:
    check(compare(test_data / "models" / model, task, 0, limit))


@pytest.mark.full
@pytest.mark.timeout(14400)
@pytest.mark.parametrize(("task", "shots"), LEADERBOARD)
def test_leaderboard(task: str, shots: int, test_data: Path) -> None:
    check(compare(test_data / "models" / "english-neox-12m", task, shots, 2000))


EXAMPLES = pytest.mark.parametrize("fixed", [False, True], ids=["drawn", "fixed"])


def generate(folder: Path, shots: int, limit: int, fixed: bool) -> tuple[list[str], list[str], str]:
    """Texts of the fast way, stock's, and the path taken, for gsm8k prompts and 64 new tokens.

    The examples are drawn for every document, as stock gsm8k does, or the same ones for all.
    """
    asked = [
        Instance("generate_until", {}, (i.args[0], {**i.args[1], "max_gen_toks": 64}), n, ("gsm8k", n, 1))  # type: ignore[arg-type]
        for n, i in enumerate(instances("gsm8k", shots, limit, fixed))
    ]
    lm = AFTLM(str(folder), device="cpu", batch_size=1)
    fast = lm.generate_until(asked, disable_tqdm=True)
    path = lm.get_model_info()["aft"]["scoring_path"]
    lm.fast = False
    return fast, lm.generate_until(asked, disable_tqdm=True), path


@pytest.mark.slow
@EXAMPLES
@pytest.mark.parametrize(("model", "shots"), [("english-neox-12m", 5), ("scratch-demo", 2)])
def test_generation_sample(model: str, shots: int, fixed: bool, test_data: Path) -> None:
    fast, slow, path = generate(test_data / "models" / model, shots, 6, fixed)
    assert fast == slow
    assert path.startswith("generated in shared batches (100")


@pytest.mark.full
@pytest.mark.timeout(7200)
@EXAMPLES
@pytest.mark.parametrize(("model", "shots"), [("english-neox-12m", 5), ("scratch-demo", 2)])
def test_generation(model: str, shots: int, fixed: bool, test_data: Path) -> None:
    fast, slow, path = generate(test_data / "models" / model, shots, 200, fixed)
    assert fast == slow
    assert path.startswith("generated in shared batches (100")
