"""Experiment trackers: what is logged, for real with TensorBoard, and that none of them ends a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import tracking
from click.testing import CliRunner

from lm_eval_aft import AFTError, train_vector
from lm_eval_aft._util.tracking import TRACKERS, Trackers
from lm_eval_aft.cli.main import aft
from lm_eval_aft.evaluation.formatting import row_numbers
from lm_eval_aft.studies.runner import _log_cell
from lm_eval_aft.training.checkpoint import log_training

CLASSES = {"trackio": "TrackioTracker", "wandb": "WandBTracker", "mlflow": "MLflowTracker"}


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, read back from TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


class Fake(tracking.GeneralTracker):
    """Remembers what it was told; fails where it is asked to."""

    name, requires_logging_directory = "fake", False
    failing = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.told: list[Any] = [(args, options)]

    @property
    def tracker(self) -> None:
        return None

    def _tell(self, what: str, value: Any) -> None:
        if what == self.failing:
            raise RuntimeError(f"no {what}")
        self.told.append((what, value))

    def start(self) -> None:
        self._tell("start", None)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._tell("settings", values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._tell("log", (step, values))

    def finish(self) -> None:
        self._tell("finish", None)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Fake]]:
    """Fake trackers in place of those of other packages, by name; they count as installed."""
    made: dict[str, list[Fake]] = {name: [] for name in CLASSES}
    for name, kind in CLASSES.items():

        def make(*args: Any, name: str = name, **options: Any) -> Fake:
            made[name].append(Fake(*args, **options))
            return made[name][-1]

        monkeypatch.setattr(tracking, kind, lambda *a, _make=make, **o: _make(*a, **_renamed(o)))
    monkeypatch.setattr("lm_eval_aft._util.tracking.find_spec", lambda _name: object())
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    return made


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    return {("run" if key == "name" else key): value for key, value in options.items()}


def test_training_is_logged_and_so_is_what_a_resumed_run_did_before(tmp_path: Path) -> None:
    settings = {"protocol": "rapid", "layers": "1,2", "train_docs": 8, "selection_docs": 8, "epochs": 2}
    train_vector("demo", "aft_demo_choice", tmp_path / "v", log=["tensorboard"], progress=False, **settings)
    found = events(tmp_path / "v/tensorboard")
    ledger = [json.loads(line) for line in (tmp_path / "v/training.jsonl").read_text().splitlines()]
    epochs = [line for line in ledger if line["event"] == "epoch"]
    assert len(epochs) == 4
    for name in {line["candidate"] for line in epochs}:
        own = [line["score"] for line in epochs if line["candidate"] == name]
        assert [value for _, value in found[f"{name}/score"]] == pytest.approx(own)
    steps = [step for name in found if name.endswith("/score") for step, _ in found[name]]
    assert sorted(steps) == list(range(1, len(steps) + 1))  # the baseline's, then one for each epoch
    chosen = ledger[-1]
    assert [v for _, v in found["chosen/layer"]] == [chosen["layer"]]
    assert [v for _, v in found["chosen/norm"]] == pytest.approx([chosen["norm"]])
    (written,) = (tmp_path / "v/tensorboard").rglob("hparams.yml")
    stored = yaml.safe_load(written.read_text())
    assert (stored["model"], stored["protocol.epochs"]) == ("demo", 2)


def test_trials_of_a_search_without_an_optimiser_are_a_curve_for_each_direction(fakes: Any) -> None:
    trackers = Trackers(["mlflow"], "out", model="m")
    score = {"score": 1.0, "accuracy": 0.5, "baseline": 2.0, "n": 8, "tasks": {}}
    log_training(trackers, {"event": "start", "settings": {"task": "t", "protocol": {"lengths": [0.1, 0.2]}}})
    trial = {"event": "trial", "layer": 3, "seed": 0, "positions": "all", **score}
    for share in ("0.1", "0.2"):
        name = f"search/layer3-all-seed0-{share}"
        log_training(trackers, {**trial, "candidate": name, "share": float(share)})
    log_training(trackers, {"event": "dropped", "candidate": "x", "reason": "not finite"})
    told = fakes["mlflow"][0].told
    assert told[2][1]["protocol.lengths"] == "[0.1, 0.2]"
    assert [(step, values["search/layer3-all-seed0/share"]) for _, (step, values) in told[3:]] == [
        (1, 0.1),
        (2, 0.2),
    ]
    assert "search/layer3-all-seed0/score" in told[3][1][1]


ROW = {
    "task": "arc",
    "metric": "acc",
    "filter": "none",
    "run": "steered/v",
    "n": 9,
    "verdict": "better",
    "baseline": 0.5,
    "steered": 0.6,
    "difference": 0.1,
    "low": 0.01,
    "high": 0.2,
    "p_value": 0.03,
    "p_adjusted": 0.06,
}


def test_rows_and_cells(fakes: Any) -> None:
    assert row_numbers(ROW)["arc/acc/steered/v/p_value"] == 0.03
    with Trackers(["wandb", "wandb"], "out") as trackers:
        trackers.settings({})
        _log_cell(trackers, {"event": "start", "name": "x"})
        _log_cell(
            trackers, {"event": "cell", "name": "m/t/v/seed-0", "seconds": {"train": 2.0}, "rows": [ROW]}
        )
    (one,) = fakes["wandb"]
    ((_, (step, values)),) = [each for each in one.told[1:] if each[0] == "log"]
    place = "m/t/v/seed-0/arc/acc/steered/v"
    assert step == 1
    assert values[f"{place}/difference"] == 0.1
    assert values["m/t/v/seed-0/seconds"] == 2.0
    assert f"{place}/p_adjusted" not in values  # adjusted within the cell alone, it would mislead
    assert one.told[-1][0] == "finish"


def test_an_evaluation_logs_its_rows(tmp_path: Path) -> None:
    vector = Path(__file__).parents[1] / "fixtures/0.1/library/math/trained"
    out = tmp_path / "out"
    done = CliRunner().invoke(
        aft,
        f"eval --model demo --vector {vector} --tasks aft_demo_choice --output {out} --log tensorboard "
        "-- --limit 6",
    )
    assert done.exit_code == 0, done.output
    found = events(out / "tensorboard")
    prefix = "aft_demo_choice/acc_norm/steered/trained"
    assert {f"{prefix}/{name}" for name in ("baseline", "difference", "low", "high", "p_value")} <= set(found)
    again = CliRunner().invoke(aft, ["report", str(out)])  # what the tracker wrote is in nobody's way
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("failing", ["start", "settings", "log", "finish"])
def test_a_tracker_that_fails_is_warned_of_once_and_the_others_go_on(
    failing: str, fakes: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = type("Broken", (Fake,), {"failing": failing})
    monkeypatch.setattr(tracking, "TrackioTracker", lambda *args, **options: broken(*args))
    with caplog.at_level(logging.WARNING), Trackers(["trackio", "mlflow"], "out") as trackers:
        trackers.settings({})
        trackers.log({"a": 1})
        trackers.log({"a": 2})
    (told,) = caplog.messages
    assert "trackio failed" in told
    assert f"no {failing}" in told
    assert [what for what, _ in fakes["mlflow"][0].told[1:]] == ["start", "settings", "log", "log", "finish"]


def test_only_numbers_that_are_finite_and_names_that_all_take(fakes: Any) -> None:
    trackers = Trackers(["mlflow"], "out")
    trackers.settings({"a": None, "b": {"c": "x" * 1000}, "d": float("nan"), "e": True})
    trackers.log({"x,none/a+b": 1, "y": None, "z": float("inf"), "text": "no"})
    trackers.log({"y": None})
    told = dict(fakes["mlflow"][0].told[2:])
    settings = told["settings"]
    assert (len(settings["b.c"]), settings["d"], settings["e"]) == (250, "nan", True)
    assert "a" not in settings
    assert told["log"] == (1, {"x_none/a_b": 1})


def test_what_is_missing_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval_aft._util.tracking.find_spec", lambda _name: None)
    for name, (_, package) in TRACKERS.items():
        with pytest.raises(AFTError, match="not installed") as error:
            Trackers([name], tmp_path)
        assert error.value.hint == f"pip install {package}"
    with pytest.raises(AFTError, match="no tracker 'comet'"):
        Trackers(["comet"], tmp_path)
    with pytest.raises(AFTError, match="none was given"):
        train_vector("demo", "aft_demo_choice", log=["tensorboard"])
    assert list(tmp_path.iterdir()) == []


def test_other_processes_than_the_first_log_nothing(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with Trackers(["mlflow"], "out") as trackers:
        trackers.settings({})
        trackers.log({"a": 1})
    assert fakes["mlflow"] == []


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, None),
        ({"WANDB_MODE": "disabled"}, None),
    ],
)
def test_weights_and_biases_asks_for_no_key(
    variables: dict[str, str], mode: str | None, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    Trackers(["wandb"], "runs/arc").settings({})
    args, options = fakes["wandb"][0].told[0]
    assert (args, options) == (("lm-eval-aft",), {"run": "arc", "mode": mode})


def test_offline_nothing_is_sent_anywhere(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    Trackers(["wandb"], "out").settings({})
    assert fakes["wandb"][0].told[0][1]["mode"] == "offline"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    Trackers(["mlflow"], "out")
    for name, variable, value in (
        ("mlflow", "MLFLOW_TRACKING_URI", "https://somewhere"),
        ("trackio", "TRACKIO_SPACE_ID", "me/space"),
    ):
        monkeypatch.setenv(variable, value)
        with pytest.raises(AFTError, match=f"{variable} is set"):
            Trackers([name], "out")
