"""One candidate being trained: its vector, its optimiser, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lm_eval_aft.errors import AFTError
from lm_eval_aft.packing import Document
from lm_eval_aft.training.objectives import Score


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run.

    Attributes:
        lr: Adam's learning rate; one step moves each entry of the vector by about this much.
        l2: lambda of the penalty lambda * ||v||^2 added to the loss.
        epochs: the most epochs a candidate may run.
        patience: epochs without a better selection score after which it stops; ``None``: never.
        min_epochs: epochs before ``patience`` may stop it.
        regression: stop as soon as the selection score falls behind the baseline's.
        clip: gradient norm above which gradients are scaled down; ``None``: never.
        batch_size: documents per optimiser step.
    """

    lr: float = 1e-3
    l2: float = 0.0
    epochs: int = 10
    patience: int | None = 3
    clip: float | None = 1.0
    batch_size: int = 1
    min_epochs: int = 1
    regression: bool = False

    def __post_init__(self) -> None:
        limits = {"lr": self.lr > 0, "l2": self.l2 >= 0, "epochs": self.epochs >= 1}
        limits |= {"batch_size": self.batch_size >= 1, "clip": self.clip is None or self.clip > 0}
        limits |= {"patience": self.patience is None or self.patience >= 1}
        for name, fine in limits.items():
            if not fine:
                raise AFTError(f"{name}={getattr(self, name)} makes no sense.", "Give a positive number.")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for ledgers and headers."""
        return asdict(self)


@dataclass
class Candidate:
    """One (layer, seed, learning rate, L2) in training.

    The vector is a float32 master copy (float64 for a float64 model), shape ``(hidden_size,)``;
    zero at the start, but for retries.

    Attributes:
        stage: the part of the protocol it belongs to.
        scores: the selection score after each epoch so far.
    """

    layer: int
    seed: int
    recipe: Recipe
    vector: Tensor
    stage: str = "final"
    scores: list[Score] = field(default_factory=list)
    best: Tensor | None = None
    best_score: Score | None = None
    best_epoch: int = 0
    stale: int = 0
    stopped: str = ""
    _adam: torch.optim.Adam = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.vector.requires_grad_(True)
        self._adam = torch.optim.Adam([self.vector], lr=self.recipe.lr)

    @property
    def name(self) -> str:
        """Names the candidate in ledgers and state files."""
        recipe = self.recipe
        return f"{self.stage}/layer{self.layer}-seed{self.seed}-lr{recipe.lr:g}-l2{recipe.l2:g}"

    @property
    def epoch(self) -> int:
        """Epochs done so far."""
        return len(self.scores)

    @property
    def setting(self) -> tuple[int, float, float]:
        """What its sisters of other seeds share with it: layer, learning rate and L2."""
        return (self.layer, self.recipe.lr, self.recipe.l2)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to what this step has gathered so far."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """One Adam step on the gathered gradient plus that of the L2 term.

        A gradient that is not finite stops the candidate instead.
        """
        gradient = self.vector.grad
        if gradient is None:
            return
        if self.recipe.l2:
            gradient.add_(self.vector.detach(), alpha=2 * self.recipe.l2)
        if not bool(torch.isfinite(gradient).all()):
            self.stopped = "gradient not finite"
        else:
            if self.recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_([self.vector], self.recipe.clip)
            self._adam.step()
        self._adam.zero_grad()

    def record(self, score: Score, baseline: Score | None = None) -> None:
        """Note an epoch's selection score; keep the best vector; stop when it is time."""
        if not math.isfinite(score.score):
            self.stopped = "selection score not finite"
            return
        self.scores.append(score)
        if self.best_score is None or score.order() < self.best_score.order():
            self.best, self.best_score = self.vector.detach().clone(), score
            self.best_epoch, self.stale = self.epoch, 0
        else:
            self.stale += 1
        recipe = self.recipe
        if recipe.regression and baseline is not None and score.score > baseline.score:
            self.stopped = "regression: worse than the baseline"
        elif (
            recipe.patience is not None and self.stale >= recipe.patience and self.epoch >= recipe.min_epochs
        ):
            self.stopped = f"no better for {self.stale} epochs"
        elif self.epoch >= recipe.epochs:
            self.stopped = "all epochs done"

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values from which `restore` continues exactly."""
        tensors = {"vector": self.vector.detach()}
        if self.best is not None:
            tensors["best"] = self.best
        moments = self._adam.state.get(self.vector, {})
        tensors |= {f"adam.{key}": value for key, value in moments.items()}
        values = {
            "scores": [score.to_dict() for score in self.scores],
            "stale": self.stale,
            "stopped": self.stopped,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score.to_dict() if self.best_score else None,
        }
        return tensors, values

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up a state written by `state`."""
        with torch.no_grad():
            self.vector.copy_(tensors["vector"])
        self.best = tensors["best"].to(self.vector) if "best" in tensors else None
        moments = {k.removeprefix("adam."): v.clone() for k, v in tensors.items() if k.startswith("adam.")}
        if moments:
            placed = {k: v if k == "step" else v.to(self.vector) for k, v in moments.items()}
            self._adam.state[self.vector] = placed
        self.scores, self.stale = [Score(**score) for score in values["scores"]], values["stale"]
        self.stopped, self.best_epoch = values["stopped"], values["best_epoch"]
        self.best_score = Score(**values["best_score"]) if values["best_score"] else None


class Tick(Protocol):
    """Called with the number of candidate-documents just finished."""

    def __call__(self, done: int, /) -> None: ...


class Engine(Protocol):
    """Trains and scores candidates; `Trajectory` is the fast one, `Reference` the plain one."""

    def train(self, candidates: Sequence[Candidate], steps: Sequence[Sequence[Document]], tick: Tick) -> None:
        """Take one optimiser step per entry of ``steps`` for every candidate."""

    def evaluate(
        self, candidates: Sequence[Candidate], documents: Sequence[Document], tick: Tick
    ) -> list[Score]:
        """Score the candidates' present vectors, in order."""

    def baseline(self, documents: Sequence[Document], tick: Tick) -> Score:
        """Score the frozen model."""


def in_steps(documents: Sequence[Document], batch_size: int) -> Iterator[Sequence[Document]]:
    """Cut documents into optimiser steps, in order."""
    for start in range(0, len(documents), batch_size):
        yield documents[start : start + batch_size]
