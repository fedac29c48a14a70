"""One candidate being trained: its vector, its optimiser, when it stops, and which process trains it."""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import torch
from pydantic import AfterValidator
from torch import Tensor, distributed

from lm_eval_aft._util.settings import Count, NotNegative, Positive, settings
from lm_eval_aft.engine.batching import TokenizedDocument, units
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.steering.vector import residual_shares
from lm_eval_aft.steering.vector_file import layer_index
from lm_eval_aft.training.selection import DEFAULT_CRITERION, Criterion, Score, find_criterion

# Learning rates and penalties in units that fit every model. Median norms of residual streams of 4 and of
# 37,000 have been seen: 1e-2 is a large step in one model and none in another. "0.01r" means 0.01 in units
# of r, the root mean square entry of a typical hidden state at the layer: median norm / sqrt(hidden_size).


def _check_relative(text: str) -> str:
    try:
        number = float(text.removesuffix("r"))
    except ValueError:
        number = math.nan
    if not (text.endswith("r") and math.isfinite(number) and number > 0):
        raise ValueError("Input should be a number, or a positive one with an r, as in 0.01r")
    return text


Relative = Annotated[str, AfterValidator(_check_relative)]


def read_rate(text: str) -> float | str:
    """``1e-2`` as a number; ``0.01r`` as text, in one spelling for each number.

    Raises:
        ValueError: neither.

    >>> read_rate("1e-2"), read_rate("1e-2r"), read_rate("0.0100 r")
    (0.01, '0.01r', '0.01r')
    """
    text = text.strip()
    return f"{float(text[:-1]):.12g}r" if text.endswith("r") else float(text)


def rate_text(rate: float | str, digits: str = "g") -> str:
    """For tables and names.

    >>> rate_text(0.01), rate_text("0.0123456r", ".3g")
    ('0.01', '0.0123r')
    """
    return f"{float(rate[:-1]):{digits}}r" if isinstance(rate, str) else f"{rate:{digits}}"


def absolute(rate: float | str, unit: float) -> float:
    """A number as it is, or so many units."""
    return float(rate[:-1]) * unit if isinstance(rate, str) else rate


@settings
class Recipe:
    """How one candidate is trained.

    Attributes:
        lr: Adam's learning rate; one step moves each entry of the vector by about this much. In
            residual-stream units, or as ``"0.01r"`` relative to the layer's typical entry, see above.
        l2: lambda of the penalty lambda * ||v||^2 added to the loss; ``"0.001r"``: with v measured in r.
        epochs: the most epochs a candidate may run.
        patience: epochs without a better selection score after which it stops; ``None``: never.
        min_epochs: epochs before ``patience`` may stop it.
        regression: stop as soon as the selection score falls behind the baseline's.
        clip: gradient norm above which gradients are scaled down; ``None``: never. With a relative ``lr``
            that is the gradient with respect to the vector in units of r.
        criterion: what makes one epoch better than another.
    """

    lr: Positive | Relative = 1e-3
    l2: NotNegative | Relative = 0.0
    epochs: Count = 10
    patience: Count | None = 3
    clip: Positive | None = 1.0
    min_epochs: Count = 1
    regression: bool = False
    criterion: str = DEFAULT_CRITERION


@dataclass
class Candidate:
    """One (layer, seed, learning rate, L2) in training.

    Its tensors are float32 master copies (float64 for a float64 model). They start out adding
    nothing, except for retries and methods without training.

    Attributes:
        layer: the layer it steers, or the lowest of them.
        intervention: what it steers with; its tensors are trained in place.
        best: its tensors after the best epoch so far.
        stage: the part of the protocol it belongs to.
        norms: median norm of the hidden states by layer; a relative learning rate or penalty needs it.
        scores: the selection score after each epoch so far.
        steps: optimiser steps done in an epoch that is not finished.
    """

    layer: int
    seed: int
    recipe: Recipe
    intervention: Intervention
    stage: str = "final"
    norms: Mapping[int, float] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_score: Score | None = None
    best_epoch: int = 0
    stale: int = 0
    stopped: str = ""
    steps: int = 0
    _adam: torch.optim.Adam = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.trained:
            for tensor in self._tensors:
                tensor.requires_grad_(True)
        if not self.norms and (isinstance(self.recipe.lr, str) or isinstance(self.recipe.l2, str)):
            raise ValueError("A relative learning rate or penalty needs the norms of the hidden states.")
        groups: dict[float, list[Tensor]] = {}
        for name, tensor in self.intervention.tensors.items():
            groups.setdefault(absolute(self.recipe.lr, self._unit(name)), []).append(tensor)
        self._adam = torch.optim.Adam([{"params": each, "lr": lr} for lr, each in groups.items()])

    def _unit(self, name: str) -> float:
        """The unit of the tensor of this name when hidden states are measured in r; 1 where r is unknown."""
        if not self.norms:
            return 1.0
        layer = layer_index(name)
        norm = self.norms[self.layer if layer is None else layer]
        r = norm / len(self.intervention.tensors[f"layers.{self.layer}"]) ** 0.5
        return float(r ** self.intervention.method.power(name))

    @property
    def name(self) -> str:
        """Names the candidate in ledgers and state files."""
        lr, l2 = rate_text(self.recipe.lr), rate_text(self.recipe.l2)
        return f"{self.stage}/layer{self.layer}-seed{self.seed}-lr{lr}-l2{l2}"

    @property
    def criterion(self) -> Criterion:
        """What makes one of its epochs better than another."""
        return find_criterion(self.recipe.criterion)

    @property
    def trained(self) -> bool:
        """Whether its method has anything to train."""
        return self.intervention.method.trained

    @property
    def vector(self) -> Tensor:
        """Its vector (hidden_size,) at its layer."""
        return self.intervention.tensors[f"layers.{self.layer}"]

    @property
    def _tensors(self) -> list[Tensor]:
        return list(self.intervention.tensors.values())

    def norm(self, best: bool = False) -> float:
        """Euclidean norm of its vectors over all layers, as they are or were after the best epoch."""
        tensors = self.best if best and self.best is not None else self.intervention.tensors
        vectors = [tensor.detach() for name, tensor in tensors.items() if name.startswith("layers.")]
        return float(torch.stack([vector.norm() for vector in vectors]).norm())

    def relative_norm(self, best: bool = False) -> float | None:
        """The same, each vector as a share of the median residual norm at its layer; ``None``: unknown.

        It is unknown too where the entries of ``layers.{L}`` have no unit.
        """
        tensors = self.best if best and self.best is not None else self.intervention.tensors
        layers = {layer: tensors[f"layers.{layer}"].detach() for layer in self.intervention.layers}
        shares = residual_shares(self.intervention.method, layers, self.norms)
        return math.hypot(*shares.values()) if shares else None

    @property
    def epoch(self) -> int:
        """Epochs done so far."""
        return len(self.scores)

    @property
    def setting(self) -> tuple[int, float | str, float | str]:
        """What it shares with its other seeds: layer, learning rate and L2."""
        return (self.layer, self.recipe.lr, self.recipe.l2)

    @property
    def chosen(self) -> dict[str, Any]:
        """What the run chose, for the header of the vector."""
        found = dict(zip(("layer", "lr", "l2"), self.setting, strict=True))
        if isinstance(self.recipe.lr, str) and len(self.intervention.layers) == 1:
            found["lr_absolute"] = absolute(self.recipe.lr, self._unit(f"layers.{self.layer}"))
        return found

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to this step's."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """One Adam step on the accumulated gradient plus that of the L2 term.

        A gradient that is not finite stops the candidate instead. With a relative learning rate all tensors
        are trained as if hidden states were measured in r, the clipped gradient included, so that the unit
        of the residual stream makes no difference.
        """
        tensors = self.intervention.tensors
        moved = {name: tensor for name, tensor in tensors.items() if tensor.grad is not None}
        if not moved:
            return
        gradients = [tensor.grad for tensor in moved.values() if tensor.grad is not None]
        for (name, tensor), gradient in zip(moved.items(), gradients, strict=True):
            unit = self._unit(name)
            if self.recipe.l2:
                gradient.add_(tensor.detach(), alpha=2 * absolute(self.recipe.l2, unit**-2))
            if isinstance(self.recipe.lr, str):
                gradient.mul_(unit)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            self.stopped = "gradient not finite"
        else:
            if self.recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(list(moved.values()), self.recipe.clip)
            self._adam.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradient accumulated so far."""
        self._adam.zero_grad()

    def record(self, score: Score, baseline: Score | None = None) -> None:
        """Note an epoch's selection score; keep the best vector; stop when it is time."""
        if not math.isfinite(score.score):
            self.stopped = "selection score not finite"
            return
        self.scores.append(score)
        if self.best_score is None or self.criterion.improves(score, on=self.best_score):
            tensors = self.intervention.tensors
            self.best = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self.best_score = score
            self.best_epoch, self.stale = self.epoch, 0
        else:
            self.stale += 1
        recipe = self.recipe
        if recipe.regression and baseline is not None and self.criterion.change(score, baseline) > 0:
            self.stopped = "regression: worse than the baseline"
        elif (
            recipe.patience is not None and self.stale >= recipe.patience and self.epoch >= recipe.min_epochs
        ):
            self.stopped = f"no better for {self.stale} epochs"
        elif self.epoch >= recipe.epochs:
            self.stopped = "all epochs done"

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values from which `restore` continues exactly."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.intervention.tensors.items():
            tensors[f"now:{name}"] = tensor.detach()
            for key, value in self._adam.state.get(tensor, {}).items():
                tensors[f"adam.{key}:{name}"] = value
        tensors |= {f"best:{name}": tensor for name, tensor in (self.best or {}).items()}
        values = {name: getattr(self, name) for name in ("stale", "stopped", "steps", "best_epoch")}
        values["scores"] = [score.to_dict() for score in self.scores]
        values["best_score"] = self.best_score.to_dict() if self.best_score else None
        return tensors, values

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up a state written by `state`."""
        best: dict[str, Tensor] = {}
        for name, tensor in self.intervention.tensors.items():
            with torch.no_grad():
                tensor.copy_(tensors[f"now:{name}"])
            if f"best:{name}" in tensors:
                best[name] = tensors[f"best:{name}"].to(tensor)
            moments = {key: tensors.get(f"adam.{key}:{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            kept = {key: value.clone() for key, value in moments.items() if value is not None}
            if kept:
                self._adam.state[tensor] = {k: v if k == "step" else v.to(tensor) for k, v in kept.items()}
        self.best = best or None
        for name in ("stale", "stopped", "steps", "best_epoch"):
            setattr(self, name, values[name])
        self.scores = [Score(**score) for score in values["scores"]]
        self.best_score = Score(**values["best_score"]) if values["best_score"] else None


Tick = Callable[[int], None]  # called with the number of (candidate, document) pairs just finished


class Engine(Protocol):
    """Trains and scores candidates; `Trajectory` is the fast one, `Reference` the plain one."""

    def train(
        self, candidates: Sequence[Candidate], steps: Sequence[Sequence[TokenizedDocument]], tick: Tick
    ) -> None:
        """Take one optimiser step per entry of ``steps`` for every candidate."""

    def evaluate(
        self, candidates: Sequence[Candidate], documents: Sequence[TokenizedDocument], tick: Tick
    ) -> list[Score]:
        """Score the candidates' present vectors, in order."""

    def baseline(self, documents: Sequence[TokenizedDocument], tick: Tick) -> Score:
        """Score the frozen model."""


def in_steps(
    documents: Sequence[TokenizedDocument], batch_size: int
) -> Iterator[Sequence[TokenizedDocument]]:
    """Cut documents into optimiser steps of so many, in order; those of a group share a step."""
    step: list[TokenizedDocument] = []
    for unit in units(documents):
        step += (documents[i] for i in unit)
        if len(step) >= batch_size:
            yield step
            step = []
    if step:
        yield step


# Candidates do not depend on each other, so each process of `accelerate launch` or `torchrun` trains some of
# them on all documents; nothing is exchanged within an epoch, and every vector is the same as one process
# would find.


class Workers:
    """The processes of this run; one, where there is no launcher.

    On GPUs loading the model has joined them already. On CPUs this does: accelerate's `PartialState` takes
    each process there for the only one unless ACCELERATE_USE_CPU is set.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        if not distributed.is_available():
            return
        if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            distributed.init_process_group("gloo")
            atexit.register(distributed.destroy_process_group)
        if distributed.is_initialized():
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def shard(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """This process's part; since layers differ in cost, each process gets every ``size``-th one."""
        ordered = sorted(candidates, key=lambda candidate: (candidate.layer, candidate.name))
        return ordered[self.rank :: self.size]

    def exchange(self, candidates: Sequence[Candidate]) -> None:
        """Bring all candidates to the state in which the process that trains them has left them."""
        if self.size == 1:
            return
        packed = {}
        for candidate in self.shard(candidates):
            tensors, values = candidate.state()
            packed[candidate.name] = ({key: tensor.cpu() for key, tensor in tensors.items()}, values)
        states = {name: state for part in self.gather(packed) for name, state in part.items()}
        for candidate in candidates:
            if candidate.name not in packed:
                candidate.restore(*states[candidate.name])

    def broadcast(self, value: Any) -> Any:
        """The first process's ``value``, in all of them."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in the order of ranks, in all of them."""
        if self.size == 1:
            return [value]
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, value)
        return parts
