"""A bottleneck network that reads the hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lm_eval_aft.methods.base import Method, Shapes, linear

if TYPE_CHECKING:
    from torch import Generator, Tensor


class MLP(Method):
    """Adds ``W2 relu(W1 h + b1) + b2``.

    The bottleneck has ``k = max(1, d // 8)`` units, so that there are ``2 d k + k + d`` parameters:
    263,296 at hidden size 1024. ``b2`` is the file's ``layers.{L}``. The second layer starts at zero,
    the first as ``torch.nn.Linear`` does.
    """

    name = "mlp"
    formula = "W2 relu(W1 h + b1) + b2"
    count = "2 d k + k + d, k = d // 8"

    def extra(self, hidden_size: int) -> Shapes:
        units = max(1, hidden_size // 8)
        return {
            "method.down.weight": (units, hidden_size),
            "method.down.bias": (units,),
            "method.up.weight": (hidden_size, units),
        }

    def start(self, hidden_size: int, layers: tuple[int, ...], generator: Generator) -> dict[str, Tensor]:
        tensors = super().start(hidden_size, layers, generator)
        units = len(tensors["method.down.bias"])
        tensors["method.down.weight"], tensors["method.down.bias"] = linear(units, hidden_size, generator)
        return tensors

    def delta(self, tensors: Mapping[str, Tensor], layer: int, hidden: Tensor) -> Tensor:
        units = (hidden @ tensors["method.down.weight"].mT + tensors["method.down.bias"]).relu()
        return units @ tensors["method.up.weight"].mT + tensors[f"layers.{layer}"]

    def directions(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        return super().directions(tensors) | {"method.up.weight": 0}
