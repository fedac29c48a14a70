"""A method with its tensors, ready to be put on a model's blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_aft.methods import METHODS, Method
from lm_eval_aft.positions import Passes, is_unsteered, mask_for

# What is done at a block: a vector (hidden_size,) is added, or a function gives the new hidden states.
Shift = Tensor | Callable[[Tensor], Tensor]


@dataclass
class Intervention:
    """What steers a model: a method's tensors, how strongly, and where.

    Attributes:
        tensors: by the names they have in a vector file; see `lm_eval_aft.methods.base`.
        coefficient: multiplies what is added.
        positions: which tokens are steered; see `lm_eval_aft.positions`.
        passes: what knows the tokens' roles in passes that do not say them.
    """

    method: Method
    tensors: dict[str, Tensor]
    coefficient: float = 1.0
    positions: str = "all"
    passes: Passes | None = None

    @classmethod
    def static(cls, layer: int, vector: Tensor) -> Intervention:
        """One vector (hidden_size,) at one layer."""
        return cls(METHODS["static"], {f"layers.{layer}": vector})

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers steered, ascending."""
        found = (name.partition(".") for name in self.tensors)
        return tuple(sorted(int(index) for prefix, _, index in found if prefix == "layers"))

    def shifts(self) -> dict[int, Shift]:
        """What is done at each layer; nothing at coefficient 0."""
        if not self.coefficient:
            return {}
        if self.method.constant and self.positions == "all":
            return {layer: self._vector(layer) for layer in self.layers}
        return {layer: self._steer(layer) for layer in self.layers}

    def _vector(self, layer: int) -> Tensor:
        vector = self.tensors[f"layers.{layer}"]
        return vector if self.coefficient == 1 else vector * self.coefficient

    def _steer(self, layer: int) -> Callable[[Tensor], Tensor]:
        def steer(hidden: Tensor) -> Tensor:
            if self.positions != "all" and is_unsteered():
                return hidden
            own = {name: tensor.to(hidden.device) for name, tensor in self.tensors.items()}
            wide = hidden.to(own[f"layers.{layer}"].dtype)
            delta = self.method.delta(own, layer, wide) * self.coefficient
            steered = hidden + delta.to(hidden.dtype)
            mask = mask_for(self.positions, hidden, self.passes)
            return steered if mask is None else torch.where(mask, steered, hidden)

        return steer
