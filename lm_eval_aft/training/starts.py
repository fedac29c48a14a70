"""What a candidate begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lm_eval_aft.backbone import Backbone
from lm_eval_aft.intervention import Intervention
from lm_eval_aft.methods import Method
from lm_eval_aft.packing import Document
from lm_eval_aft.training.contrast import mean_differences
from lm_eval_aft.training.trajectory import master_dtype, residual_norm


@dataclass
class Starts:
    """Makes candidates' first interventions.

    Attributes:
        layers: the layers of the run; methods that steer several at once steer all of these.
        train: training documents by seed; methods without training are computed from them.
        probe: documents on which hidden states are measured for small random starts.
        window: most tokens the model reads.
    """

    model: nn.Module
    backbone: Backbone
    method: Method
    positions: str
    layers: Sequence[int]
    train: Mapping[int, Sequence[Document]]
    probe: Sequence[Document]
    window: int
    _differences: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    def __call__(self, layer: int, seed: int, noise: int | None = None) -> Intervention:
        """A candidate's start at a layer: nothing added yet, or for a retry something small and random.

        Random parameters are drawn from ``seed``, a retry's vectors from ``noise``.
        """
        layers = tuple(self.layers) if self.method.together else (layer,)
        generator = torch.Generator().manual_seed(seed)
        tensors = self.method.start(self.backbone.hidden_size, layers, generator)
        if not self.method.trained:
            found = self._contrast(seed)
            tensors |= {f"layers.{each}": found[each].clone() for each in layers}
        elif noise is not None:
            for place, each in enumerate(layers):
                size = residual_norm(self.model, self.backbone, each, self.probe)
                tensors[f"layers.{each}"] = small_random(self.backbone.hidden_size, size, noise + place)
        parameter = next(self.model.parameters())
        placed = {
            name: tensor.to(parameter.device, master_dtype(parameter.dtype))
            for name, tensor in tensors.items()
        }
        return Intervention(self.method, placed, positions=self.positions)

    def _contrast(self, seed: int) -> dict[int, Tensor]:
        if seed not in self._differences:
            self._differences[seed] = mean_differences(
                self.model, self.backbone, self.train[seed], self.window
            )
        return self._differences[seed]


def small_random(width: int, residual_norm: float, seed: int) -> Tensor:
    """A retry's first vector: N(0, 0.01 * residual_norm^2 / width), shape ``(width,)``.

    Args:
        residual_norm: median norm of the hidden states at its layer.
    """
    scale = 0.1 * residual_norm / width**0.5
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).mul_(scale)
