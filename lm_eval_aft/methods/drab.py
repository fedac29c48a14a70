"""A vector behind a gate that reads the hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lm_eval_aft.methods.base import Method, Shapes, linear

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Drab(Method):
    """Adds ``sigmoid(w.h + b) v``. ``2 d + 1`` parameters: 2,049 at hidden size 1024.

    ``v`` starts at zero, the gate as ``torch.nn.Linear`` does.
    """

    name = "drab"
    formula = "sigmoid(w.h + b) v"
    count = "2 d + 1"

    def extra(self, hidden_size: int) -> Shapes:
        return {"method.gate.weight": (1, hidden_size), "method.gate.bias": (1,)}

    def start(self, hidden_size: int, layers: tuple[int, ...], generator: Generator) -> dict[str, Tensor]:
        tensors = super().start(hidden_size, layers, generator)
        tensors["method.gate.weight"], tensors["method.gate.bias"] = linear(1, hidden_size, generator)
        return tensors

    def delta(self, tensors: Mapping[str, Tensor], layer: int, hidden: Tensor) -> Tensor:
        gate = (hidden @ tensors["method.gate.weight"].mT + tensors["method.gate.bias"]).sigmoid()
        return gate * tensors[f"layers.{layer}"]
