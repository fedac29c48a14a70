"""A bank of vectors, mixed by a router that reads the hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lm_eval_aft.methods.base import Method, Shapes, linear

if TYPE_CHECKING:
    from torch import Generator, Tensor

BANK = 8


class DrabStrong(Method):
    """Adds ``sum_i p_i v_i`` over a bank of 8, ``p = softmax(W2 relu(W1 h + b1) + b2)``.

    The router's hidden layer has ``r = max(1, d // 16)`` units, so that there are
    ``r (d + 1) + 8 (r + 1) + 8 d`` parameters: 74,312 at hidden size 1024. The first vector of the
    bank is the file's ``layers.{L}``. The bank starts at zero, the router as ``torch.nn.Linear`` does.
    """

    name = "drab-strong"
    formula = "sum_i softmax(W2 relu(W1 h + b1) + b2)_i v_i, i = 1..8"
    count = "r (d + 1) + 8 (r + 1) + 8 d, r = d // 16"

    def extra(self, hidden_size: int) -> Shapes:
        units = max(1, hidden_size // 16)
        return {
            "method.bank": (BANK - 1, hidden_size),
            "method.router.hidden.weight": (units, hidden_size),
            "method.router.hidden.bias": (units,),
            "method.router.out.weight": (BANK, units),
            "method.router.out.bias": (BANK,),
        }

    def start(self, hidden_size: int, layers: tuple[int, ...], generator: Generator) -> dict[str, Tensor]:
        tensors = super().start(hidden_size, layers, generator)
        for part in ("hidden", "out"):
            rows, columns = tensors[f"method.router.{part}.weight"].shape
            weight, bias = linear(rows, columns, generator)
            tensors |= {f"method.router.{part}.weight": weight, f"method.router.{part}.bias": bias}
        return tensors

    def delta(self, tensors: Mapping[str, Tensor], layer: int, hidden: Tensor) -> Tensor:
        units = hidden @ tensors["method.router.hidden.weight"].mT + tensors["method.router.hidden.bias"]
        scores = units.relu() @ tensors["method.router.out.weight"].mT + tensors["method.router.out.bias"]
        shares = scores.softmax(-1)
        first = shares[..., :1] * tensors[f"layers.{layer}"]
        return first + shares[..., 1:] @ tensors["method.bank"]

    def directions(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        return super().directions(tensors) | {"method.bank": 1}
