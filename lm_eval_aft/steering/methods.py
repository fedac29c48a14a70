"""The methods: how what is added to the residual stream is parametrised.

To add one, write a class here under ``@register_method``: training, scoring, files, controls, exports,
``aft methods`` and ``--method`` all read the table `METHODS`.

A method knows nothing of models. Its tensors have the names they have in a vector file: ``layers.{L}``,
shape ``(hidden_size,)``, for each layer it steers, and anything else it needs under ``method.``. Importing
this module does not import torch, so that a library can be listed without it.
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
        name: its name in files, flags and reports.
        formula: what it adds to the hidden state ``h``, for people.
        count: its number of parameters, a formula in the hidden size ``d`` and the number of layers ``n``.
        constant: whether it adds the same to every hidden state, so that it can be summed and exported.
        trained: whether there is anything to train.
        steers_all_layers: whether it steers all its layers at once; other methods steer one.
        adds: how the names of tensors begin whose entries have the unit of hidden states.
        reads: likewise of those that hidden states are multiplied by; the others have no unit.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    count: ClassVar[str]
    constant: ClassVar[bool] = False
    trained: ClassVar[bool] = True
    steers_all_layers: ClassVar[bool] = False
    adds: ClassVar[tuple[str, ...]] = ("layers.",)
    reads: ClassVar[tuple[str, ...]] = ()

    def power(self, name: str) -> int:
        """The exponent of the hidden states' unit in a tensor's entries: 1, 0 or -1.

        >>> METHODS["drab"].power("layers.3"), METHODS["drab"].power("method.gate.weight")
        (1, -1)
        """
        return name.startswith(self.adds) - name.startswith(self.reads)

    def extra_shapes(self, hidden_size: int) -> Shapes:
        """Shapes of its tensors other than ``layers.{L}``, by name."""
        return {}

    def parameters(self, hidden_size: int, layers: int = 1) -> int:
        """How many numbers it trains (or computes) when it steers this many layers."""
        own = sum(math.prod(shape) for shape in self.extra_shapes(hidden_size).values())
        return hidden_size * (layers if self.steers_all_layers else 1) + own

    def initial_tensors(
        self, hidden_size: int, layers: tuple[int, ...], generator: Generator
    ) -> dict[str, Tensor]:
        """Initial tensors, fp32, that add nothing yet; random ones are drawn from ``generator``."""
        import torch

        tensors = {f"layers.{layer}": torch.zeros(hidden_size) for layer in layers}
        return tensors | {name: torch.zeros(shape) for name, shape in self.extra_shapes(hidden_size).items()}

    @abstractmethod
    def delta(self, tensors: Mapping[str, Tensor], layer: int, hidden: Tensor) -> Tensor:
        """What is added at a layer to ``hidden`` (..., hidden_size): that shape, or ``(hidden_size,)``.

        Differentiable; ``hidden`` has the tensors' dtype.
        """

    def retry_std(self, hidden_size: int, residual_norm: float) -> float:
        """Standard deviation of the entries of ``layers.{L}`` that a retry starts from.

        Args:
            residual_norm: median norm of the hidden states at the layer.
        """
        return float(0.1 * residual_norm / hidden_size**0.5)

    def directions(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The tensors whose vectors, along the given axis, span everything that is ever added."""
        return {name: 0 for name in tensors if name.startswith("layers.")}

    def placebo(self, tensors: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """Tensors that add as much to every hidden state, in a random direction.

        Everything that can be added is turned by one random rotation (Haar).
        """
        import torch

        axes = self.directions(tensors)
        moved = {name: tensors[name].movedim(axis, 0) for name, axis in axes.items()}
        columns = [each.reshape(len(each), -1) for each in moved.values()]
        basis, parts = torch.linalg.qr(torch.cat(columns, dim=1))
        drawn, corner = torch.linalg.qr(torch.randn(basis.shape, generator=generator))
        turned = (drawn * corner.diagonal().sign()) @ parts  # without the signs the draw is not uniform
        pieces = turned.split([each.shape[1] for each in columns], dim=1)
        return dict(tensors) | {
            name: piece.reshape(old.shape).movedim(0, axes[name])
            for (name, old), piece in zip(moved.items(), pieces, strict=True)
        }


METHODS: dict[str, Method] = {}
DEFAULT_METHOD = "static"


def register_method(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method available under its name."""
    METHODS[cls.name] = cls()
    return cls


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        AFTError: there is none.

    >>> find_method("static").parameters(hidden_size=1024)
    1024
    """
    if name not in METHODS:
        raise AFTError(f"There is no method {name!r}.", f"Choose one of: {', '.join(METHODS)}.")
    return METHODS[name]


class Constant(Method):
    """A method that adds one vector at each of its layers."""

    constant = True

    def delta(self, tensors: Mapping[str, Tensor], layer: int, hidden: Tensor) -> Tensor:
        return tensors[f"layers.{layer}"]

    def placebo(self, tensors: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """A random direction at each layer, as long as the vector there."""
        import torch

        drawn = {name: torch.randn(values.shape, generator=generator) for name, values in tensors.items()}
        return {name: drawn[name] * (values.norm() / drawn[name].norm()) for name, values in tensors.items()}


def linear(rows: int, columns: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """A random weight (rows, columns) and bias (rows,), both U(-1/sqrt(columns), 1/sqrt(columns)).

    The initialisation of ``torch.nn.Linear``.
    """
    import torch

    bound = columns**-0.5
    weight = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(rows).uniform_(-bound, bound, generator=generator)


@register_method
class Static(Constant):
    """Adds ``v``, the same at every position. ``d`` parameters: 1,024 at hidden size 1024."""

    name = "static"
    formula = "v"
    count = "d"


@register_method
class Drab(Method):
    """Adds ``sigmoid(w.h + b) v``. ``2 d + 1`` parameters: 2,049 at hidden size 1024.

    ``v`` starts at zero, the gate as ``torch.nn.Linear`` does.
    """

    name = "drab"
    formula = "sigmoid(w.h + b) v"
    count = "2 d + 1"
    reads = ("method.gate.weight",)

    def extra_shapes(self, hidden_size: int) -> Shapes:
        return {"method.gate.weight": (1, hidden_size), "method.gate.bias": (1,)}

    def initial_tensors(
        self, hidden_size: int, layers: tuple[int, ...], generator: Generator
    ) -> dict[str, Tensor]:
        tensors = super().initial_tensors(hidden_size, layers, generator)
        tensors["method.gate.weight"], tensors["method.gate.bias"] = linear(1, hidden_size, generator)
        return tensors

    def delta(self, tensors: Mapping[str, Tensor], layer: int, hidden: Tensor) -> Tensor:
        gate = (hidden @ tensors["method.gate.weight"].mT + tensors["method.gate.bias"]).sigmoid()
        return gate * tensors[f"layers.{layer}"]


BANK = 8


@register_method
class DrabStrong(Method):
    """Adds ``sum_i p_i v_i`` over a bank of 8, ``p = softmax(W2 relu(W1 h + b1) + b2)``.

    The router's hidden layer has ``r = max(1, d // 16)`` units, so that there are
    ``r (d + 1) + 8 (r + 1) + 8 d`` parameters: 74,312 at hidden size 1024. The first vector of the
    bank is the file's ``layers.{L}``. The bank starts at zero, the router as ``torch.nn.Linear`` does.
    """

    name = "drab-strong"
    formula = "sum_i softmax(W2 relu(W1 h + b1) + b2)_i v_i, i = 1..8"
    count = "r (d + 1) + 8 (r + 1) + 8 d, r = d // 16"
    adds = ("layers.", "method.bank")
    reads = ("method.router.hidden.weight",)

    def extra_shapes(self, hidden_size: int) -> Shapes:
        units = max(1, hidden_size // 16)
        return {
            "method.bank": (BANK - 1, hidden_size),
            "method.router.hidden.weight": (units, hidden_size),
            "method.router.hidden.bias": (units,),
            "method.router.out.weight": (BANK, units),
            "method.router.out.bias": (BANK,),
        }

    def initial_tensors(
        self, hidden_size: int, layers: tuple[int, ...], generator: Generator
    ) -> dict[str, Tensor]:
        tensors = super().initial_tensors(hidden_size, layers, generator)
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


@register_method
class MLP(Method):
    """Adds ``W2 relu(W1 h + b1) + b2``.

    The bottleneck has ``k = max(1, d // 8)`` units, so that there are ``2 d k + k + d`` parameters:
    263,296 at hidden size 1024. ``b2`` is the file's ``layers.{L}``. The second layer starts at zero,
    the first as ``torch.nn.Linear`` does.
    """

    name = "mlp"
    formula = "W2 relu(W1 h + b1) + b2"
    count = "2 d k + k + d, k = d // 8"
    adds = ("layers.", "method.up.weight")
    reads = ("method.down.weight",)

    def extra_shapes(self, hidden_size: int) -> Shapes:
        units = max(1, hidden_size // 8)
        return {
            "method.down.weight": (units, hidden_size),
            "method.down.bias": (units,),
            "method.up.weight": (hidden_size, units),
        }

    def initial_tensors(
        self, hidden_size: int, layers: tuple[int, ...], generator: Generator
    ) -> dict[str, Tensor]:
        tensors = super().initial_tensors(hidden_size, layers, generator)
        units = len(tensors["method.down.bias"])
        tensors["method.down.weight"], tensors["method.down.bias"] = linear(units, hidden_size, generator)
        return tensors

    def delta(self, tensors: Mapping[str, Tensor], layer: int, hidden: Tensor) -> Tensor:
        units = (hidden @ tensors["method.down.weight"].mT + tensors["method.down.bias"]).relu()
        return units @ tensors["method.up.weight"].mT + tensors[f"layers.{layer}"]

    def directions(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        return super().directions(tensors) | {"method.up.weight": 0}


@register_method
class AllLayers(Constant):
    """Adds ``v_L`` at each of ``n`` layers. ``n d`` parameters: 24,576 for 24 layers of size 1024."""

    name = "all-layers"
    formula = "v_L at every layer L"
    count = "n d"
    steers_all_layers = True


@register_method
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


@register_method
class Scale(Method):
    """Scales each dimension: ``h`` becomes ``(1 + s) * h``. ``d`` parameters: 1,024 at hidden size 1024.

    IA3's way (Liu et al. 2022, arXiv:2205.05638), at the residual stream. ``s``, the file's ``layers.{L}``,
    starts at zero. Its entries are factors, without the units of the residual stream.
    """

    name = "scale"
    formula = "s * h, elementwise"
    count = "d"
    adds = ()

    def delta(self, tensors: Mapping[str, Tensor], layer: int, hidden: Tensor) -> Tensor:
        return hidden * tensors[f"layers.{layer}"]

    def retry_std(self, hidden_size: int, residual_norm: float) -> float:
        """As other methods': about a tenth of the hidden state is added."""
        return 0.1

    def placebo(self, tensors: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """Random signs for the factors: only that keeps the norm of ``s * h`` for every ``h``."""
        import torch

        signs = {
            name: torch.randint(2, values.shape, generator=generator) for name, values in tensors.items()
        }
        return {name: values * (2 * signs[name] - 1) for name, values in tensors.items()}
