"""The screen: what one backward pass at the zero vector says about every layer.

The gradient with respect to a vector added at a block's output is the gradient with respect to that
output, summed over positions; one backward pass gives it for all blocks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lm_eval_aft.errors import AFTError
from lm_eval_aft.packing import Batch, Document, continuation_logits
from lm_eval_aft.steering import hidden_states, with_hidden_states
from lm_eval_aft.training.trajectory import Trajectory


def check_screen(screen: str, plain: bool = True) -> None:
    """Raise `AFTError` unless ``screen`` is ``off``, ``order`` or a number of layers to keep.

    Args:
        plain: whether one vector is to be added at every position, which is what the screen looks at.
    """
    if screen != "off" and not plain:
        raise AFTError("The screen knows static vectors at all positions only.", "Leave out --screen.")
    if screen not in ("off", "order") and not (screen.isdigit() and int(screen) >= 1):
        raise AFTError(f"There is no screen {screen!r}.", "Use off, order, or how many layers to keep.")


def first_gradients(engine: Trajectory, documents: Sequence[Document]) -> dict[int, Tensor]:
    """Gradient of the mean loss at v = 0 for a vector at each block, shape ``(hidden_size,)``, fp32."""
    totals: dict[int, Tensor] = {}
    for batch in engine.batches(documents):
        for layer, gradient in _gradients(engine, batch).items():
            totals[layer] = totals.get(layer, torch.zeros_like(gradient)) + gradient
    return {layer: total / len(documents) for layer, total in totals.items()}


def _gradients(engine: Trajectory, batch: Batch) -> dict[int, Tensor]:
    streams: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = hidden_states(output)
            if not hidden.requires_grad:  # the first block: nothing below it is trained
                hidden = hidden.detach().requires_grad_(True)
            hidden.retain_grad()
            streams[layer] = hidden
            return with_hidden_states(output, hidden)

        return hook

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(engine.backbone.blocks)]
    try:
        losses = engine.objective.losses(continuation_logits(engine.model, batch), batch)
    finally:
        for handle in handles:
            handle.remove()
    losses.sum().backward()  # type: ignore[no-untyped-call]
    return {
        layer: hidden.grad.float().sum(dim=(0, 1))
        for layer, hidden in streams.items()
        if hidden.grad is not None
    }


def layer_order(gradients: dict[int, Tensor], layers: Sequence[int]) -> list[int]:
    """Layers by the first-order gain of one Adam step, largest first.

    Adam's first step moves every entry by the learning rate against its gradient's sign, so to
    first order the loss falls by the learning rate times the gradient's 1-norm.
    """
    return sorted(layers, key=lambda layer: -float(gradients[layer].abs().sum()))


def rank_correlation(order: Sequence[int], changes: dict[int, float]) -> float:
    """Spearman's correlation between the screen's order and the sweep's (lower change is better).

    NaN for fewer than three layers.
    """
    shared = [layer for layer in order if layer in changes]
    if len(shared) < 3:
        return float("nan")
    return float(spearmanr(range(len(shared)), [changes[layer] for layer in shared]).statistic)
