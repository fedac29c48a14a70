"""Placebo controls: what a vector must beat before its gain means anything."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.harness.examples import Example
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.training.objectives import CONTROLS, OBJECTIVES


def check_control(control: str | None, objective: str) -> None:
    """Raise `AFTError` for a control that does not exist or does not fit the objective."""
    if control is None or control == "random":
        return
    fits = [name for name, kind in OBJECTIVES.items() if control in kind.controls]
    if not fits:
        raise AFTError(f"There is no control {control!r}.", f"Choose one of: {', '.join(CONTROLS)}.")
    if objective not in fits:
        raise AFTError(
            f"The control {control!r} is for the objective {fits[0]!r}, this task uses {objective!r}.",
            "Use random, which fits every task.",
        )


def apply_control(examples: Sequence[Example], control: str | None, seed: int) -> list[Example]:
    """The training examples of a control; other controls leave them as they are.

    ``shuffled`` permutes the gold labels across examples (a label beyond an example's options
    wraps around); ``format`` permutes the gold continuations. Each task keeps its own.
    """
    if control not in ("shuffled", "format"):
        return list(examples)
    found = list(examples)
    for task in sorted({example.task for example in examples}):
        places = [i for i, example in enumerate(examples) if example.task == task]
        for i, changed in zip(
            places, _apply_to_group([examples[i] for i in places], control, seed), strict=True
        ):
            found[i] = changed
    return found


def _apply_to_group(examples: Sequence[Example], control: str, seed: int) -> list[Example]:
    if len(examples) < 2:
        return list(examples)
    order = list(range(len(examples)))
    random.Random(f"{control}|{seed}").shuffle(order)
    changed = []
    for place, index in enumerate(order):
        example = examples[index]
        # The neighbour in a random circle: no example keeps its own.
        other = examples[order[(place + 1) % len(order)]]
        if control == "shuffled":
            n = len(example.requests)
            changed.append(replace(example, gold=tuple(sorted({gold % n for gold in other.gold}))))
        else:
            context = example.requests[0][0]
            changed.append(
                replace(example, requests=((context, other.requests[0][1]),), lengths=other.lengths)
            )
    back = dict(zip(order, changed, strict=True))
    return [back[i] for i in range(len(examples))]


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """A vector in a random direction with the same norm at each layer and the same coefficient.

    The direction is the vector's own: other vectors' placebos of this ``seed`` have others.

    Of a dynamic method all that it can add is turned by one random rotation: what is added keeps its
    norm at every token, and when it is added stays as it was learnt.
    """
    drawn = hashlib.sha256(f"{vector.digest()}|{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(drawn[:7]))
    method = METHODS[vector.method]
    metadata = {**vector.metadata, "control": "random", "control_seed": seed}
    if not method.constant:
        return replace(vector, **_rotated(vector, generator), metadata=metadata)
    layers = {}
    for layer, values in vector.layers.items():
        direction = torch.randn(values.shape, generator=generator)
        layers[layer] = direction * (values.norm() / direction.norm())
    return replace(vector, layers=layers, metadata=metadata)


def _rotated(vector: SteeringVector, generator: torch.Generator) -> dict[str, Any]:
    """Layers and extra tensors after one random rotation (Haar) of what they span."""
    tensors = vector.tensors
    axes = METHODS[vector.method].directions(tensors)
    columns = [tensors[name].movedim(axis, 0).reshape(vector.hidden_size, -1) for name, axis in axes.items()]
    basis, parts = torch.linalg.qr(torch.cat(columns, dim=1))
    drawn, corner = torch.linalg.qr(torch.randn(basis.shape, generator=generator))
    turned = (drawn * corner.diagonal().sign()) @ parts  # without the signs the draw is not uniform
    for (name, axis), part in zip(
        axes.items(), turned.split([each.shape[1] for each in columns], dim=1), strict=True
    ):
        old = tensors[name].movedim(axis, 0)
        tensors[name] = part.reshape(old.shape).movedim(0, axis)
    return {
        "layers": {layer: tensors[f"layers.{layer}"] for layer in vector.layers},
        "extra": {name: tensors[name] for name in vector.extra},
    }
