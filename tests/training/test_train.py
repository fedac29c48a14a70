"""The main job on toy tasks: what it writes, that it learns, that it resumes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from lm_eval_aft import AFTError, SteeringVector, load_vector, train_vector
from lm_eval_aft.harness.examples import Example
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.training import checkpoint as events_module
from lm_eval_aft.training import sweep as sweep_module
from lm_eval_aft.training.candidate import Candidate, Recipe
from lm_eval_aft.training.recipe import TrainingPlan, parse_layers
from lm_eval_aft.training.run import cost
from lm_eval_aft.training.selection import Score
from lm_eval_aft.training.setup import apply_control, prepare, random_like
from tests.support.processes import by_one_and_by_two

# Every layer and seed to the end: no search, no retries.
RECIPE = {
    "protocol": "maximum",
    "lr": 3e-2,
    "l2": 0.0,
    "epochs": 4,
    "patience": 2,
    "batch_size": 4,
    "regression": False,
    "retries": 0,
}


@pytest.fixture
def settings(toy_tasks: Callable[..., str]) -> dict[str, Any]:
    return {
        "include_path": (toy_tasks(),),
        "seeds": 2,
        "layers": "1-2",
        "train_docs": 20,
        "selection_docs": 20,
        "progress": False,
        **RECIPE,
    }


@pytest.fixture
def lm(checkpoint: Callable[..., str]) -> AFTLM:
    return AFTLM(checkpoint("llama"), device="cpu", batch_size=4)


def plan_of(settings: dict[str, Any]) -> TrainingPlan:
    return TrainingPlan.of("toy_choice", **{key: each for key, each in settings.items() if key != "progress"})


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["toy_choice", "toy_generate"])
def test_folder_and_choice(task: str, lm: AFTLM, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = train_vector(lm, task, folder, **settings)
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == {
        "vector.safetensors",
        "README.md",
        "training.jsonl",
        "sweep.png",
        "training.html",
        "seeds/seed-0.safetensors",
        "seeds/seed-1.safetensors",
    }
    vector = load_vector(folder)
    meta = vector.metadata
    assert (meta["task"], meta["num_fewshot"], meta["control"]) == (task, 0, None)
    assert meta["splits"]["train"] == meta["splits"]["selection"] == 20
    assert vector.digest() == result.vector.digest()
    # The layer has the best mean over seeds; the vector is that layer's median (here: worse) seed.
    lines = [line for line in events(folder) if line["event"] == "epoch"]
    best: dict[tuple[int, int], float] = {}
    for line in lines:
        key = (line["layer"], line["seed"])
        best[key] = min(best.get(key, 9e9), line["score"])
    means = {layer: (best[layer, 0] + best[layer, 1]) / 2 for layer in (1, 2)}
    (layer,) = vector.layers
    assert means[layer] == min(means.values())
    assert best[layer, meta["seed"]] == max(best[layer, 0], best[layer, 1])
    assert meta["selection"]["layers"] == {
        str(k): {
            "score": pytest.approx(v),
            "accuracy": pytest.approx(meta["selection"]["layers"][str(k)]["accuracy"]),
            "stage": "final",
            "n": 20,
        }
        for k, v in means.items()
    }
    card = ModelCard.load(folder / "README.md")
    card_data = card.data.to_dict()
    assert card_data["library_name"] == "lm-eval-aft"
    # And it fits its model, checked with the tokenizer.
    lm.steer(vector)


def test_training_improves_the_training_loss(lm: AFTLM, settings: dict[str, Any]) -> None:
    """On documents it was trained on, a vector must beat the baseline clearly."""
    from lm_eval_aft.training.recipe import TrainingPlan
    from lm_eval_aft.training.setup import prepare
    from lm_eval_aft.training.trainer import make_engine

    settings.pop("progress")
    prepared = prepare(lm, TrainingPlan.of("toy_choice", **settings))
    from lm_eval_aft.harness.examples import encode
    from lm_eval_aft.training.candidate import in_steps

    documents = encode(prepared.splits.train(0), lm)
    engine, _ = make_engine(lm.model, prepared.backbone, prepared.objective, documents)
    candidate = Candidate(
        1, 0, Recipe(lr=3e-2), Intervention.static(1, torch.zeros(prepared.backbone.hidden_size))
    )
    before = engine.baseline(documents, lambda _: None)
    for _ in range(6):
        engine.train([candidate], list(in_steps(documents, 4)), lambda _: None)
    after = engine.evaluate([candidate], documents, lambda _: None)[0]
    assert after.cross_entropy < before.cross_entropy - 0.5


def test_the_loss_is_recorded_and_shown(lm: AFTLM, settings: dict[str, Any]) -> None:
    from lm_eval_aft.evaluation.provenance import training_command
    from lm_eval_aft.training.recipe import TrainingPlan
    from lm_eval_aft.training.setup import prepare

    asked = {"metric": "both", "choice_loss": "margin", "margin": 2.0}
    settings |= {"layers": "1", "seeds": 1, "epochs": 1} | asked
    plain = dict(settings)
    plain.pop("progress")
    plan = TrainingPlan.of("toy_choice", **plain)
    assert prepare(lm, plan).summary()["loss"] == "margin of 2 nats"
    meta = train_vector(lm, "toy_choice", **settings).vector.metadata
    assert (meta["metric"], meta["loss"]) == ("both", {"name": "margin", "margin": 2.0})
    command = training_command(plan.to_dict(), meta)
    assert "--metric both --choice-loss margin --margin 2.0" in command


def test_equal_plans_give_equal_vectors(lm: AFTLM, settings: dict[str, Any]) -> None:
    one, two = (train_vector(lm, "toy_choice", **settings) for _ in range(2))
    assert one.vector.digest() == two.vector.digest()
    assert one.finalists[0].digest() != one.finalists[1].digest()


def test_killed_runs_resume_to_the_same_vector(
    checkpoint: Callable[..., str], settings: dict[str, Any], lm: AFTLM, tmp_path: Path
) -> None:
    """A process killed without warning after its second epoch, and one more while resuming."""
    settings["patience"] = 0
    whole = train_vector(lm, "toy_choice", tmp_path / "whole", **settings)
    program = f"""
import os, signal, sys
from lm_eval_aft import train_vector
from lm_eval_aft.training import checkpoint as events
saves = 0
original = events.save_state
def save(*arguments):
    global saves
    original(*arguments)
    saves += 1
    if saves == int(sys.argv[1]):
        with open({str(tmp_path / "killed" / "training.jsonl")!r}, "a") as ledger:
            ledger.write('{{"event": "epo')  # as if killed in the middle of a line
        os.kill(os.getpid(), signal.SIGKILL)
events.save_state = save
settings = {settings!r}
train_vector({checkpoint("llama")!r}, "toy_choice", {str(tmp_path / "killed")!r}, resume=True,
             model_args={{"device": "cpu", "batch_size": 4}}, **settings)
"""
    for saves, expected in (("3", -signal.SIGKILL), ("1", -signal.SIGKILL), ("99", 0)):
        done = subprocess.run(
            [sys.executable, "-c", program, saves], capture_output=True, text=True, check=False
        )
        assert done.returncode == expected, done.stderr[-2000:]
    resumed = load_vector(tmp_path / "killed")
    assert resumed.digest() == whole.vector.digest()
    assert not (tmp_path / "killed" / "state.safetensors").exists()

    def comparable(folder: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in e.items() if k != "time"} for e in events(tmp_path / folder)]

    assert comparable("killed") == comparable("whole")
    pages = [(tmp_path / name / "training.html").read_text() for name in ("killed", "whole")]
    assert pages[0] == pages[1]


def test_ctrl_c_leaves_a_ledger_to_resume_from(
    checkpoint: Callable[..., str], settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "lm_eval_aft.cli.main", "train", "--model", checkpoint("llama")),
        *("--task", "toy_choice", "--include-path", settings["include_path"][0], "--output", str(folder)),
        *("--train-docs", "20", "--selection-docs", "20", "--epochs", "5000", "--patience", "0"),
        *("--rungs", "none", "--lr", "1e-3", "--l2", "0"),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "training.jsonl").exists() and len(events_so_far(folder)) > 5:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with --resume" in errors
    assert "Traceback" not in errors
    assert events(folder)[0]["event"] == "start"
    assert not (folder / "vector.safetensors").exists()


def events_so_far(folder: Path) -> list[str]:
    return (folder / "training.jsonl").read_text().splitlines()


def test_resume_refuses_other_settings(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "out"

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sweep_module.Sweep, "_rank", stop)
        with pytest.raises(KeyboardInterrupt):
            train_vector(lm, "toy_choice", folder, **settings)
    with pytest.raises(AFTError, match="protocol differ"):
        train_vector(lm, "toy_choice", folder, resume=True, **{**settings, "layers": "1"})
    assert train_vector(lm, "toy_choice", folder, resume=True, **settings).vector
    with pytest.raises(AFTError, match="finished"):
        train_vector(lm, "toy_choice", folder, resume=True, **settings)
    with pytest.raises(AFTError, match="not empty"):
        train_vector(lm, "toy_choice", folder, **settings)
    train_vector(lm, "toy_choice", folder, overwrite=True, **settings)


def test_a_diverging_seed_is_dropped_with_its_reason(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    step = Candidate.step

    def explode(self: Candidate) -> None:
        if self.layer == 2 and self.seed == 1 and self.vector.grad is not None:
            self.vector.grad[0] = float("nan")
        step(self)

    monkeypatch.setattr(Candidate, "step", explode)
    result = train_vector(lm, "toy_choice", tmp_path / "out", **settings)
    assert [layer.layer for layer in result.sweep.layers] == [1]
    (dropped,) = [event for event in events(tmp_path / "out") if event["event"] == "dropped"]
    assert (dropped["candidate"].startswith("final/layer2-seed1"), dropped["reason"]) == (
        True,
        "gradient not finite",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", list(range(24))),
        ("3", [3]),
        ("5,2", [2, 5]),
        ("4-6,20", [4, 5, 6, 20]),
        ("25%-75%:4", [6, 10, 14]),
        ("0%", [0]),
        ("100%", [23]),
        ("1-9:3", [1, 4, 7]),
    ],
)
def test_layers(text: str, expected: list[int]) -> None:
    assert parse_layers(text, 24) == expected


@pytest.mark.parametrize("text", ["24", "x", "", "5-3", "101%", "1-30", "2:0", "-1"])
def test_wrong_layers(text: str) -> None:
    with pytest.raises(AFTError):
        parse_layers(text, 24)


def test_best_epoch_is_kept_and_patience_stops() -> None:
    made = Candidate(0, 0, Recipe(patience=2), Intervention.static(0, torch.zeros(2)))
    for step, score in enumerate([3.0, 1.0, 2.0, 2.0]):
        with torch.no_grad():
            made.vector.fill_(step)
        made.record(Score(score, score, 0.5, 1.0, 10))
    assert made.best is not None
    assert made.best["layers.0"].tolist() == [1.0, 1.0]
    assert (made.best_epoch, made.stopped) == (2, "no better for 2 epochs")


def test_adam_step_with_l2_and_clip_equals_torchs_own() -> None:
    torch.manual_seed(0)
    start, target = torch.randn(6), torch.randn(6)
    ours = Candidate(0, 0, Recipe(lr=0.1, l2=0.3, clip=0.7), Intervention.static(0, start.clone()))
    theirs = start.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.1)
    for _ in range(5):
        ours.backward(((ours.vector - target) ** 4).sum())
        ours.step()
        adam.zero_grad()
        (((theirs - target) ** 4).sum() + 0.3 * theirs.square().sum()).backward()
        torch.nn.utils.clip_grad_norm_([theirs], 0.7)
        adam.step()
    assert torch.allclose(ours.vector, theirs, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.trained])
def test_relative_training_is_the_same_in_every_unit_of_the_residual_stream(name: str) -> None:
    """A stream 8 times as long: what is added is 8 times as long, what reads it 8 times as small."""
    method, width, factor = METHODS[name], 16, 8.0
    layers = (1, 2) if method.steers_all_layers else (1,)
    start = method.initial_tensors(width, layers, torch.Generator().manual_seed(0))
    target = {
        key: torch.randn(each.shape, generator=torch.Generator().manual_seed(1))
        for key, each in start.items()
    }
    recipe = Recipe(lr="0.03r", l2="0.2r", clip=0.7)
    ends = []
    for scale in (1.0, factor):
        units = {key: scale ** method.power(key) for key in start}
        own = {key: each.clone() * units[key] for key, each in start.items()}
        made = Candidate(1, 0, recipe, Intervention(method, own), norms={1: 2.0 * scale, 2: 6.0 * scale})
        for _ in range(5):
            loss = sum((((own[key] / units[key]) - target[key]) ** 4).sum() for key in own)
            made.backward(loss)
            made.step()
        ends.append({key: each.detach() / units[key] for key, each in own.items()})
    for key in start:
        assert torch.equal(ends[0][key], ends[1][key])
        assert not torch.equal(ends[0][key], start[key])


def test_a_relative_rate_and_penalty_are_so_many_typical_entries() -> None:
    """At a median norm of 24 and a width of 9, r is 8."""
    torch.manual_seed(0)
    target, ends = torch.randn(9), []
    for recipe in (Recipe(lr="0.01r", l2="0.5r", clip=None), Recipe(lr=0.08, l2=0.5 / 64, clip=None)):
        made = Candidate(3, 0, recipe, Intervention.static(3, torch.zeros(9)), norms={3: 24.0})
        for _ in range(4):
            made.backward(((made.vector - target) ** 2).sum())
            made.step()
        ends.append(made.vector.detach())
        assert made.chosen.get("lr_absolute") == (0.08 if recipe.lr == "0.01r" else None)
    assert torch.allclose(ends[0], ends[1], rtol=1e-5)
    assert made.relative_norm() == pytest.approx(float(ends[1].norm()) / 24)
    with pytest.raises(ValueError, match="needs the norms"):
        Candidate(3, 0, Recipe(lr="0.01r"), Intervention.static(3, torch.zeros(9)))


def longer_stream(lm: AFTLM, factor: float) -> None:
    """Make a Llama whose hidden states are ``factor`` times as long, and whose outputs are the same."""
    with torch.no_grad():
        lm.model.model.embed_tokens.weight.mul_(factor)
        for name, module in lm.model.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.weight.mul_(factor)
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon *= factor**2


def test_relative_rates_find_the_same_vector_in_a_model_with_a_longer_stream(
    checkpoint: Callable[..., str], settings: dict[str, Any], tmp_path: Path
) -> None:
    found = {}
    for factor in (1.0, 64.0):
        lm = AFTLM(checkpoint("llama"), device="cpu", batch_size=4)
        assert not lm.model.config.tie_word_embeddings
        longer_stream(lm, factor)
        plan = {**settings, "lr": "0.01r,0.1r", "l2": "0.001r", "protocol": "full"}
        found[factor] = train_vector(lm, "toy_choice", tmp_path / str(factor), **plan).vector
    one, other = found[1.0], found[64.0]
    assert list(one.layers) == list(other.layers)
    for layer, values in one.layers.items():
        assert float((other.layers[layer] / 64 - values).norm()) < 1e-3 * float(values.norm())
    chosen = [vector.metadata["protocol"]["chosen"] for vector in (one, other)]
    assert chosen[0]["lr"] == chosen[1]["lr"] in ("0.01r", "0.1r")
    assert chosen[1]["lr_absolute"] == pytest.approx(64 * chosen[0]["lr_absolute"], rel=1e-3)
    assert one.share() == pytest.approx(other.share(), rel=1e-2)
    (layer,) = one.layers
    assert one.share() == pytest.approx(one.norm() / one.metadata["residual_norm"][str(layer)], rel=1e-3)


def test_the_length_is_recorded_and_shown_as_a_share(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval_aft.cli.train import print_result

    result = train_vector(lm, "toy_choice", tmp_path / "v", **settings)
    vector = load_vector(tmp_path / "v")
    (layer,) = vector.layers
    states = []  # by transformers alone
    for example in prepare(lm, plan_of(settings)).splits.selection:
        context, continuation = lm._encode_pair(*example.requests[0])
        with torch.no_grad():
            outputs = lm.model(torch.tensor([context + continuation[:-1]]), output_hidden_states=True)
        states.append(outputs.hidden_states[layer + 1][0])
    median = float(torch.cat(states).norm(dim=-1).median())
    assert vector.metadata["residual_norm"][str(layer)] == pytest.approx(median, rel=1e-3)
    assert vector.share() == pytest.approx(vector.norm() / median, rel=1e-3)
    share = f"{100 * vector.share():.3g} %"
    assert f"of norm {vector.norm():.4g}, {share} of the median residual norm there" in (
        " ".join((tmp_path / "v" / "README.md").read_text().split())
    )
    print_result(result, "model")
    shown = capsys.readouterr().out
    assert f"{vector.norm():.2f} ({share})" in shown
    best = [line for line in events(tmp_path / "v") if line["event"] == "epoch" and line["layer"] == layer]
    assert all(line["share"] == pytest.approx(line["norm"] / median, rel=1e-3) for line in best)


def test_a_length_without_unit_or_record_has_no_share(lm: AFTLM, settings: dict[str, Any]) -> None:
    vector = train_vector(lm, "toy_choice", None, **{**settings, "method": "scale"}).vector
    assert vector.share() is None
    assert not {"share", "residual_norm"} & {*vector.metadata}
    for wrong in ({"share": {"1": "long"}}, {"share": {"1": -1}}, {"share": {}}, {}):
        assert SteeringVector({1: torch.ones(2)}, metadata=wrong).share() is None


def examples(n: int) -> list[Example]:
    return [
        Example(i, ((f"q{i}", f"a{i}"), (f"q{i}", "x"), (f"q{i}", "y")), (i % 3,), (1.0, 1.0, 1.0))
        for i in range(n)
    ]


def test_shuffled_permutes_the_labels_and_nothing_else() -> None:
    before = examples(30)
    after = apply_control(before, "shuffled", 0)
    assert sorted(e.gold for e in after) == sorted(e.gold for e in before)
    assert [e.gold for e in after] != [e.gold for e in before]
    assert [replace(e, gold=(0,)) for e in after] == [replace(e, gold=(0,)) for e in before]
    assert apply_control(before, "shuffled", 1) != after
    assert apply_control(before, None, 0) == before


def test_format_deals_everybody_another_answer() -> None:
    before = [Example(i, ((f"q{i}", f"a{i}"),), (0,), (1.0,)) for i in range(20)]
    after = apply_control(before, "format", 3)
    assert [e.requests[0][0] for e in after] == [f"q{i}" for i in range(20)]
    assert sorted(e.requests[0][1] for e in after) == sorted(f"a{i}" for i in range(20))
    assert all(e.requests[0][1] != f"a{i}" for i, e in enumerate(after))


def test_random_control_keeps_norm_layers_and_coefficient() -> None:
    vector = SteeringVector({1: torch.randn(500), 3: 5 * torch.randn(500)}, 0.7)
    placebo = random_like(vector, 0)
    assert (list(placebo.layers), placebo.coefficient) == ([1, 3], 0.7)
    for layer, values in vector.layers.items():
        assert float(placebo.layers[layer].norm()) == pytest.approx(float(values.norm()), rel=1e-5)
        assert abs(float(torch.cosine_similarity(placebo.layers[layer], values, dim=0))) < 0.2
    assert random_like(vector, 0).digest() == placebo.digest() != random_like(vector, 1).digest()


def test_controls_run_through(lm: AFTLM, settings: dict[str, Any]) -> None:
    plain = train_vector(lm, "toy_choice", **settings)
    shuffled = train_vector(lm, "toy_choice", control="shuffled", **settings)
    drawn = train_vector(lm, "toy_choice", control="random", **settings)
    assert shuffled.vector.metadata["control"] == "shuffled"
    assert shuffled.vector.digest() != plain.vector.digest()
    assert drawn.vector.norm() == pytest.approx(plain.vector.norm(), rel=1e-5)
    with pytest.raises(AFTError, match="'format' is for the objective 'lm'"):
        train_vector(lm, "toy_choice", control="format", **settings)
    assert train_vector(lm, "toy_generate", control="format", **settings).vector


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["adaptive", "maximum"])
def test_two_processes_find_the_same_vector_as_one(
    protocol: str, checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    """`accelerate launch` shares candidates out; the vector is the same to the last bit."""
    arguments = [
        *("--model", checkpoint("llama"), "--task", "toy_choice", "--include-path", toy_tasks()),
        *("--protocol", protocol, "--train-docs", "20", "--selection-docs", "20", "--epochs", "3"),
        *("--seeds", "2", "--lr", "1e-3,3e-2", "--batch-size", "4", "--device", "cpu"),
    ]
    one, two = by_one_and_by_two(arguments, tmp_path)
    assert two.metadata["selection"]["layers"] == one.metadata["selection"]["layers"]
    # One ledger, written once: the same epochs, in an order that does not matter.
    lines = [
        sorted(json.dumps({k: v for k, v in e.items() if k not in ("time", "settings")}) for e in events(f))
        for f in (tmp_path / "one", tmp_path / "two")
    ]
    assert lines[0] == lines[1]


def test_killed_search_resumes_to_the_same_vector(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The protocol `adaptive`, interrupted in each of its stages."""
    plan = {**settings, "protocol": "adaptive", "lr": (1e-3, 3e-2), "layers": "all", "epochs": 3}
    del plan["l2"], plan["retries"], plan["regression"]
    whole = train_vector(lm, "toy_choice", tmp_path / "whole", **plan)
    saves = 0
    original = events_module.save_state

    def save(*arguments: Any) -> None:
        nonlocal saves
        original(*arguments)
        saves += 1
        if saves in (1, 4, 7):
            raise KeyboardInterrupt

    monkeypatch.setattr(events_module, "save_state", save)
    interruptions = 0
    while True:
        try:
            resumed = train_vector(lm, "toy_choice", tmp_path / "broken", resume=True, **plan)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 3
    assert resumed.vector.digest() == whole.vector.digest()

    def comparable(folder: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in e.items() if k != "time"} for e in events(tmp_path / folder)]

    assert comparable("broken") == comparable("whole")


def test_screen_orders_or_keeps_layers(lm: AFTLM, settings: dict[str, Any], tmp_path: Path) -> None:
    ordered = train_vector(lm, "toy_choice", screen="order", **{**settings, "layers": "all"})
    assert ordered.screen is not None
    assert sorted(ordered.screen["order"]) == [0, 1, 2, 3]
    assert -1 <= ordered.screen["rank_correlation"] <= 1
    assert len(ordered.sweep.layers) == 4  # ordering removes nothing
    kept = train_vector(lm, "toy_choice", screen="1", **{**settings, "layers": "all"})
    assert [layer.layer for layer in kept.sweep.layers] == ordered.screen["order"][:1]
    with pytest.raises(AFTError, match="There is no screen"):
        train_vector(lm, "toy_choice", screen="sometimes", **settings)


def test_cost_estimate_is_of_the_right_size(lm: AFTLM, settings: dict[str, Any]) -> None:
    from lm_eval_aft.training.recipe import TrainingPlan
    from lm_eval_aft.training.setup import prepare

    del settings["progress"]
    small = cost(prepare(lm, TrainingPlan.of("toy_choice", **settings)))
    large = cost(prepare(lm, TrainingPlan.of("toy_choice", **{**settings, "epochs": 40})))
    assert large.flops == pytest.approx(10 * small.flops)  # as many documents, ten times the epochs
    assert small.seconds > 0
    assert small.peak_bytes > 1000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_halving_chooses_as_well_as_the_exhaustive_sweep_on_the_demo() -> None:
    """The layer of `adaptive` is within 1 % of the best one that training everything finds."""
    lm = AFTLM("demo", device="cpu", batch_size=32)
    sizes = {"train_docs": 200, "selection_docs": 300, "batch_size": 4, "epochs": 3, "progress": False}
    plan = {**sizes, "lr": (2e-3, 1e-2), "l2": 0.0, "seeds": 1}
    thinned = train_vector(lm, "aft_demo_choice", protocol="adaptive", **plan)
    exhaustive = train_vector(lm, "aft_demo_choice", protocol="adaptive", rungs=(), **plan)
    scores = {layer.layer: layer.score for layer in exhaustive.sweep.layers}
    best, baseline = min(scores.values()), exhaustive.sweep.baseline.score
    assert max(scores.values()) - best > 0.1 * (baseline - best)  # layers do differ
    assert scores[thinned.sweep.chosen.layer] <= 1.01 * best
