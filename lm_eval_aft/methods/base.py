"""What every intervention has to say of itself.

A method knows nothing of models. Its tensors go by the names they have in a vector file:
``layers.{L}``, shape ``(hidden_size,)``, one for each layer it steers, and what else it needs under
``method.``. Nothing here imports torch, so that a library can be listed without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

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
