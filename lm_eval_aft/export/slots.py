"""Where in a block a bias equals the vector: the Linear that writes into the residual stream last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft.backbone import Backbone, Conv1D
from lm_eval_aft.errors import AFTError
from lm_eval_aft.export.verify import forward_in_float32
from lm_eval_aft.steering import add_at, hidden_states

_TRIED = 3  # candidates of one block
_TOLERANCE = 1e-4  # relative to the probe; where it is wrong it is wrong by about 1


@dataclass(frozen=True)
class Slot:
    """A Linear whose bias moves the block's output by a constant.

    Attributes:
        name: path inside the block, e.g. ``mlp.down_proj``.
        scale: how far the block's output moves per unit of bias; 1 but for residual multipliers.
    """

    name: str
    scale: float


@torch.no_grad()
def find_slots(model: Any, backbone: Backbone, layer: int) -> list[Slot]:
    """The slots of block ``layer``, the one that runs last first; empty if it has none.

    Found by trial, whatever the family: a random vector is added to a Linear's output, and the block's
    output must move by that vector at every position, times one constant. That fails where the block
    normalises what the Linear wrote (post-norm), gates it (mixtures of experts) or reads it again.
    """
    block = backbone.blocks[layer]
    order = _linears_in_order(model, block, backbone.hidden_size)
    plain = _block_output(model, block)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(backbone.hidden_size, generator=generator) * plain.square().mean().sqrt()
    found = []
    for name, module in list(reversed(order))[:_TRIED]:
        handle = add_at(module, probe)
        try:
            moved = _block_output(model, block) - plain
        finally:
            handle.remove()
        scale = float((moved @ probe).mean() / (probe @ probe))
        scale = next((s for s in _exact_scales(model) if abs(scale - s) < 1e-3 * s), scale)
        off = float((moved - scale * probe).abs().max())
        if off <= _TOLERANCE * float(probe.abs().max()) and abs(scale) > _TOLERANCE:
            found.append(Slot(name, scale))
    return found


def module_of(backbone: Backbone, layer: int, slot: Slot) -> nn.Module:
    """The Linear itself.

    Raises:
        AFTError: this block is built otherwise than the one the slot was found in.
    """
    try:
        return backbone.blocks[layer].get_submodule(slot.name)
    except AttributeError as error:
        raise AFTError(f"Block {layer} has no {slot.name}, unlike other blocks of this model.") from error


def _exact_scales(model: Any) -> list[float]:
    multiplier = getattr(model.config, "residual_multiplier", None)
    return [1.0] if multiplier is None else [1.0, float(multiplier)]


def _linears_in_order(model: Any, block: nn.Module, width: int) -> list[tuple[str, nn.Module]]:
    seen: list[tuple[str, nn.Module]] = []
    handles = []
    for name, module in block.named_modules():
        writes = isinstance(module, nn.Linear) and module.out_features == width
        if writes or (isinstance(module, Conv1D) and module.nf == width):
            entry = (name, module)
            handles.append(module.register_forward_hook(lambda *_, entry=entry: seen.append(entry)))
    try:
        _block_output(model, block)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict(seen).items())


def _block_output(model: Any, block: nn.Module) -> Tensor:
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # A copy: later blocks may add to it in place.
        caught.append(hidden_states(output).float().reshape(-1, hidden_states(output).shape[-1]).clone())

    handle = block.register_forward_hook(catch)
    try:
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (1, 12), generator=torch.Generator().manual_seed(1))
        forward_in_float32(model, ids)
    finally:
        handle.remove()
    return caught[0]
