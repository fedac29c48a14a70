"""The methods: how what is added to the residual stream is parametrised.

A method knows nothing of models. Its tensors go by the names they have in a vector file:
``layers.{L}``, shape ``(hidden_size,)``, one for each layer it steers, and what else it needs under
``method.``. Nothing here imports torch, so that a library can be listed without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from lm_eval_aft._util.errors import AFTError

if TYPE_CHECKING:
    from torch import Generator, Tensor

Shapes = dict[str, tuple[int, ...]]


class Method(ABC):
    """One way to parametrise what is added to the residual stream.

    Attributes:
        name: what it is called in files, flags and reports.
        formula: what it adds to the hidden state ``h``, for people.
        count: the number of parameters as a formula in the hidden size ``d`` (and layers ``n``).
        constant: whether it adds the same to every hidden state.
        trained: whether there is anything to train.
        together: whether it steers all its layers at once; other methods steer one.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    count: ClassVar[str]
    constant: ClassVar[bool] = False
    trained: ClassVar[bool] = True
    together: ClassVar[bool] = False

    def extra(self, hidden_size: int) -> Shapes:
        """Shapes of the tensors beside ``layers.{L}``, by name."""
        return {}

    def parameters(self, hidden_size: int, layers: int = 1) -> int:
        """How many numbers it trains or computes, steering so many layers."""
        own = sum(math.prod(shape) for shape in self.extra(hidden_size).values())
        return hidden_size * (layers if self.together else 1) + own

    def start(self, hidden_size: int, layers: tuple[int, ...], generator: Generator) -> dict[str, Tensor]:
        """Tensors, fp32, with which nothing is added yet; what must be random comes from ``generator``."""
        import torch

        tensors = {f"layers.{layer}": torch.zeros(hidden_size) for layer in layers}
        return tensors | {name: torch.zeros(shape) for name, shape in self.extra(hidden_size).items()}

    @abstractmethod
    def delta(self, tensors: Mapping[str, Tensor], layer: int, hidden: Tensor) -> Tensor:
        """What is added at a layer to ``hidden`` (..., hidden_size); its shape, or ``(hidden_size,)``.

        Differentiable; computed in the tensors' dtype, in which ``hidden`` comes.
        """

    def directions(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The tensors whose vectors along the axis given span what is ever added."""
        return {name: 0 for name in tensors if name.startswith("layers.")}


class Constant(Method):
    """A method that adds one vector at each of its layers."""

    constant = True

    def delta(self, tensors: Mapping[str, Tensor], layer: int, hidden: Tensor) -> Tensor:
        return tensors[f"layers.{layer}"]


def linear(rows: int, columns: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """A random weight (rows, columns) and bias (rows,), both U(-1/sqrt(columns), 1/sqrt(columns)).

    The initialisation of ``torch.nn.Linear``.
    """
    import torch

    bound = columns**-0.5
    weight = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(rows).uniform_(-bound, bound, generator=generator)


class Static(Constant):
    """Adds ``v``, the same at every position. ``d`` parameters: 1,024 at hidden size 1024."""

    name = "static"
    formula = "v"
    count = "d"


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


class AllLayers(Constant):
    """Adds ``v_L`` at each of ``n`` layers. ``n d`` parameters: 24,576 for 24 layers of size 1024."""

    name = "all-layers"
    formula = "v_L at every layer L"
    count = "n d"
    together = True


class CAA(Constant):
    """Contrastive activation addition (Rimsky et al. 2024, arXiv:2312.06681).

    Adds the mean over training documents of the right option's mean hidden state minus the wrong
    options'. ``d`` numbers, none of them trained: 1,024 at hidden size 1024. How the hidden states
    are taken is `lm_eval_aft.training.setup`'s matter.
    """

    name = "caa"
    formula = "mean of right options' h - mean of wrong options' h"
    count = "d (not trained)"
    trained = False


# The interventions: how what is added to the residual stream is parametrised.

METHODS: dict[str, Method] = {
    method.name: method for method in (Static(), Drab(), DrabStrong(), MLP(), AllLayers(), CAA())
}
DEFAULT_METHOD = "static"


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        AFTError: there is none.
    """
    if name not in METHODS:
        raise AFTError(f"There is no method {name!r}.", f"Choose one of: {', '.join(METHODS)}.")
    return METHODS[name]
