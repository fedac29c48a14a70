"""Hyper-parameter search for one vector on the selection split: layer, learning rate, epochs, L2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import LOCK, JsonLines, canonical_json, exclusive_dir, replacing_dir
from lm_eval_aft._util.pages import markdown_table, write_formats
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import FILE_NAME
from lm_eval_aft.training.candidate import absolute, rate_text
from lm_eval_aft.training.checkpoint import TRAINING_LEDGER
from lm_eval_aft.training.recipe import Protocol, TrainingPlan, parse_layers
from lm_eval_aft.training.run import train_vector
from lm_eval_aft.training.selection import (
    DEFAULT_CRITERION,
    Criterion,
    Score,
    find_criterion,
    mean_of_seeds,
)
from lm_eval_aft.training.setup import Prepared, load_model, prepare

SEARCH_LEDGER = "search.jsonl"
SEARCH_SETTINGS = "asked.json"
WINNER, TRIALS = "winner", "trials"
STRATEGIES = ("grid", "optuna")
_USUAL = find_criterion(DEFAULT_CRITERION)


@dataclass(frozen=True)
class Space:
    """What is searched. `grid` tries every combination; `optuna` draws within the same bounds.

    Attributes:
        layers: as ``train-vector --layers`` takes them, percentages of the depth for instance.
        lr: learning rates, numbers or relative ones, as in ``"0.01r"`` (see `lm_eval_aft.training.recipe`);
            Optuna draws on a log scale from the least to the largest, all of one kind.
        epochs: epochs after which training ends, its best epoch kept; Optuna draws between the ends.
    """

    layers: str = "10%,20%,30%,40%,50%,60%,70%,80%,90%"
    lr: tuple[float | str, ...] = ("0.003r", "0.01r", "0.03r", "0.1r")
    epochs: tuple[int, ...] = (5, 10, 15, 20)
    l2: tuple[float | str, ...] = (0.0,)  # penalties; Optuna chooses one

    def __post_init__(self) -> None:
        if not (self.lr and self.epochs and self.l2) or min(self.epochs, default=0) < 1:
            raise AFTError(
                "The search space is empty.", "Give at least one layer, lr, L2 and number of epochs."
            )

    @property
    def relative(self) -> bool:
        """Whether learning rates are relative."""
        return isinstance(self.lr[0], str)

    def rates(self) -> list[float]:
        """The learning rates as numbers, for Optuna.

        Raises:
            AFTError: some are relative and some not.
        """
        if len({isinstance(each, str) for each in self.lr}) > 1:
            raise AFTError(
                f"Optuna cannot draw between {' and '.join(map(rate_text, self.lr))}.",
                "Give learning rates that are all numbers, or all relative, as in 0.001r,0.1r.",
            )
        return [absolute(each, 1.0) for each in self.lr]

    def protocol(self, seeds: int, batch_size: int) -> Protocol:
        """The grid as a recipe: every setting trained to the end, which passes each number of epochs."""
        return Protocol(
            "search",
            self.layers,
            epochs=max(self.epochs),
            patience=None,
            seeds=seeds,
            lr=tuple(dict.fromkeys(self.lr)),
            l2=tuple(dict.fromkeys(self.l2)),
            batch_size=batch_size,
        )


@dataclass(frozen=True)
class Search:
    """A search; `run` continues what an earlier call left in ``output``.

    Attributes:
        settings: of `TrainingPlan.of`, besides what is searched.
        documents: what all trials train on, once it is built.
    """

    model: str
    task: str
    output: Path
    space: Space = field(default_factory=Space)
    strategy: str = "grid"
    trials: int = 20  # how many settings Optuna tries
    seeds: int = 1
    batch_size: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    documents: dict[Any, Any] = field(default_factory=dict, repr=False)

    def prepare(self) -> Prepared:
        """The grid's plan with model and documents; Optuna's trials are parts of it.

        Raises:
            AFTError: bad input, or a folder of another search.
        """
        if self.strategy not in STRATEGIES:
            raise AFTError(f"There is no strategy {self.strategy!r}.", f"Use {' or '.join(STRATEGIES)}.")
        if self.strategy == "optuna":
            _optuna()
            self.space.rates()
        plan = TrainingPlan.of(self.task, self.space.protocol(self.seeds, self.batch_size), **self.settings)
        self._claim(plan)
        return prepare(load_model(self.model, self.model_args), plan, self.documents)

    def run(
        self, prepared: Prepared, say: Callable[[str], None] = print, progress: bool = True
    ) -> list[Point]:
        """Train what is missing; write ledger, table and winner; return the points, best first.

        Raises:
            AFTError: every setting diverged, or another process works in the folder.
        """
        with exclusive_dir(self.output):
            return self._run(prepared, say, progress)

    def _run(self, prepared: Prepared, say: Callable[[str], None], progress: bool) -> list[Point]:
        (self.output / SEARCH_SETTINGS).write_text(self._asked(prepared.plan), encoding="utf-8")
        criterion = find_criterion(prepared.plan.protocol.criterion)
        work = self._grid if self.strategy == "grid" else self._draw
        points = sorted(work(prepared, criterion, say, progress), key=lambda point: point.order(criterion))
        if not any(point.best_epoch for point in points):
            raise AFTError("Every setting diverged with one of its seeds.", "Search lower learning rates.")
        note = {"strategy": self.strategy, "points": len(points), "space": asdict(self.space)}
        note = json.loads(canonical_json(note))
        vector = SteeringVector.load(self.output / WINNER)
        if vector.metadata.get("search") != note:
            vector.metadata["search"] = note
            vector.save(self.output / WINNER)
        return points

    def _claim(self, plan: TrainingPlan) -> None:
        """Refuse a folder that holds anything but this search with these settings."""
        if not self.output.exists() or not any(each.name != LOCK for each in self.output.iterdir()):
            return
        try:
            there = (self.output / SEARCH_SETTINGS).read_text(encoding="utf-8")
        except OSError:
            raise AFTError(
                f"{self.output} is not empty, and holds no search.", "Choose another folder."
            ) from None
        if there != self._asked(plan):
            raise AFTError(
                f"The search in {self.output} had other settings.",
                "Use the same flags to continue it, or choose another folder.",
            )

    def _asked(self, plan: TrainingPlan) -> str:
        # The number of trials is left out: more of them continue the search.
        asked = {"model": self.model, "strategy": self.strategy, "plan": plan.to_dict()}
        return canonical_json(asked | {"space": asdict(self.space), "model_args": dict(self.model_args)})

    def _grid(
        self, prepared: Prepared, criterion: Criterion, _say: Callable[[str], None], progress: bool
    ) -> list[Point]:
        """One sweep over everything, sharing the frozen passes; its ledger has every setting and epoch."""
        folder = self._trained(prepared, prepared.plan, self.output / WINNER, progress)
        epochs, depth = sorted(set(self.space.epochs)), len(prepared.backbone.blocks)
        points = read_points(folder, epochs, depth, criterion=criterion)
        JsonLines(self.output / SEARCH_LEDGER).write(map(asdict, points))
        return points

    def _draw(
        self, prepared: Prepared, criterion: Criterion, say: Callable[[str], None], progress: bool
    ) -> list[Point]:
        """Optuna's trials one by one. What it proposes next follows from the ledger alone: a run resumes."""
        optuna, space = _optuna(), self.space
        sites = parse_layers(space.layers, len(prepared.backbone.blocks))
        ledger = JsonLines(self.output / SEARCH_LEDGER)
        points = [Point(**{**line, "best_epoch": tuple(line["best_epoch"])}) for line in ledger.read()]
        ranges, rates = optuna.distributions, space.rates()
        wanted = {
            "layer": ranges.IntDistribution(min(sites), max(sites)),
            "lr": ranges.FloatDistribution(min(rates), max(rates), log=min(rates) < max(rates)),
            "epochs": ranges.IntDistribution(min(space.epochs), max(space.epochs)),
            "l2": ranges.CategoricalDistribution(list(dict.fromkeys(space.l2))),
        }
        study = optuna.create_study(direction="minimize")
        for point in points:
            params = {name: getattr(point, name) for name in wanted} | {"lr": absolute(point.lr, 1.0)}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=wanted, value=point.score))
        for number in range(len(points), self.trials):
            study.sampler = optuna.samplers.TPESampler(seed=prepared.plan.first_seed + number)
            trial = study.ask(wanted)
            params = dict(trial.params)
            if space.relative:
                params["lr"] = f"{params['lr']!r}r"
            point = self._trial(prepared, criterion, number, params, progress)
            study.tell(trial, point.score)
            ledger.append(**asdict(point))
            points.append(point)
            say(
                f"trial {number}: layer {point.layer}, lr {rate_text(point.lr, '.2g')}, "
                f"l2 {rate_text(point.l2)}, {point.epochs} epochs: {point.change:+.4f} nats"
            )
        best = min(points, key=lambda point: point.order(criterion))
        with replacing_dir(self.output / WINNER) as folder:
            shutil.copytree(self._folder(best.trial or 0), folder, dirs_exist_ok=True)
        return points

    def _trial(
        self, prepared: Prepared, criterion: Criterion, number: int, params: dict[str, Any], progress: bool
    ) -> Point:
        site, depth = params.pop("layer"), len(prepared.backbone.blocks)
        protocol = prepared.plan.protocol.changed({**params, "layers": str(site)})
        plan = replace(prepared.plan, protocol=protocol)
        folder = self._trained(prepared, plan, self._folder(number), progress)
        found = read_points(folder, [params["epochs"]], depth, number, criterion)
        inf, settings = float("inf"), (params["lr"], params["l2"], params["epochs"])
        return (
            found[0] if found else Point(site, site / max(1, depth - 1), *settings, inf, inf, 0.0, (), number)
        )

    def _trained(self, prepared: Prepared, plan: TrainingPlan, folder: Path, progress: bool) -> Path:
        if not (folder / FILE_NAME).exists():
            train_vector(prepared.lm, plan, folder, resume=True, progress=progress, documents=self.documents)
        return folder

    def _folder(self, number: int) -> Path:
        return self.output / TRIALS / f"{number:04d}"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise AFTError(
            "Optuna is not installed.", 'Install it with `pip install "lm-eval-aft[optuna]"`, or use a grid.'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


# Settings tried in a search, and their scores on the selection split.


@dataclass(frozen=True)
class Point:
    """One setting and its score on the selection split."""

    layer: int
    depth: float  # the layer as a share of the depth, 0 the first block and 1 the last
    lr: float | str
    l2: float | str
    epochs: int
    score: float  # mean over seeds of the best epoch's temperature-fitted cross-entropy, within ``epochs``
    change: float  # difference from the baseline; negative is better
    accuracy: float
    best_epoch: tuple[int, ...]  # of each seed; none where one diverged, and then the score is infinite
    trial: int | None = None

    def order(self, criterion: Criterion = _USUAL) -> tuple[float, ...]:
        """Sorts better points first; at equal scores the one that trained less."""
        return (*criterion.key(self), self.epochs)


def read_points(
    folder: Path,
    epochs: Sequence[int],
    depth: int,
    trial: int | None = None,
    criterion: Criterion = _USUAL,
) -> list[Point]:
    """The settings of a finished run, from its ledger, each at each number of epochs.

    Settings in which a seed diverged are left out.
    """
    found: dict[tuple[int, Any, Any], dict[int, list[dict[str, Any]]]] = {}
    for line in JsonLines(folder / TRAINING_LEDGER).read():
        if line.get("event") == "epoch" and line["stage"] == "final":
            setting = (line["layer"], line["lr"], line["l2"])
            found.setdefault(setting, {}).setdefault(line["seed"], []).append(line)
    seeds = max((len(by_seed) for by_seed in found.values()), default=0)
    points = []
    for (layer, lr, l2), by_seed in found.items():
        for most in epochs:
            best = [
                min(lines[:most], key=lambda line: criterion.key(Score.of(line)))
                for lines in by_seed.values()
                if len(lines) >= most
            ]
            if len(best) < seeds:
                continue
            score, accuracy = mean_of_seeds([Score.of(line) for line in best])
            settings = (layer, layer / max(1, depth - 1), lr, l2, most)
            epochs_of_best = tuple(each["epoch"] for each in best)
            change = score - best[0]["baseline"]
            points.append(Point(*settings, score, change, accuracy, epochs_of_best, trial))
    return points


_SHOWN: dict[str, Callable[[Point], str]] = {
    "layer": lambda point: str(point.layer),
    "depth": lambda point: f"{point.depth:.0%}",
    "lr": lambda point: rate_text(point.lr, ".3g"),
    "l2": lambda point: rate_text(point.l2),
    "epochs": lambda point: str(point.epochs),
    "cross-entropy": lambda point: f"{point.score:.4f}",
    "change": lambda point: f"{point.change:+.4f}",
    "accuracy": lambda point: f"{point.accuracy:.1%}",
    "best epoch": lambda point: "/".join(map(str, point.best_epoch)),
}
POINT_COLUMNS = tuple(_SHOWN)


def search_rows(points: Sequence[Point]) -> list[list[str]]:
    """Lines in the order of `POINT_COLUMNS`, best first."""
    return [[show(point) for show in _SHOWN.values()] for point in points]


SEARCH_NOTE = (
    "Scores on the selection split, taken from the training split: these numbers chose the vector and are "
    "not results. The best of {count} looks better than it is; score the winner on the evaluation split."
)


def write_search_table(points: Sequence[Point], folder: Path, title: str) -> Path:
    """``search.md``: all points, best first."""
    note = SEARCH_NOTE.format(count=len(points))
    text = f"# {title}\n\n{note}\n\n{markdown_table(POINT_COLUMNS, search_rows(points))}\n"
    return write_formats({"md": text}, folder, "search")[0]
