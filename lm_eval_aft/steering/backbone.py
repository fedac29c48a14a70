"""Where a Hugging Face causal language model keeps its decoder blocks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.private_names import CACHE_ARGUMENTS

try:
    from transformers.pytorch_utils import Conv1D as Conv1D  # of GPT-2's linear layers
except ImportError:  # no known release lacks it

    class Conv1D(nn.Module):  # type: ignore[no-redef]
        """Stands in for it: no layer is an instance."""


UNTOLD = "untold"  # the config does not say which attention kernel it uses
# The last part of the names under which transformers keeps decoder blocks.
_USUAL_NAMES = {"layers", "h", "blocks", "block", "decoder_layers"}


@dataclass(frozen=True)
class Backbone:
    """The parts of a model that steering needs.

    Attributes:
        name: dotted path of the block list inside the model, e.g. ``model.layers``.
        blocks: the decoder blocks in order; ``blocks[L]`` is layer L.
        hidden_size: width of the residual stream.
    """

    name: str
    blocks: Sequence[nn.Module]
    hidden_size: int

    def check_layer(self, layer: int) -> None:
        """Raise `AFTError` unless ``layer`` is a block of this model."""
        if not 0 <= layer < len(self.blocks):
            raise AFTError(
                f"Layer {layer} is out of range: this model has blocks 0 to {len(self.blocks) - 1}.",
                "Layers are counted from 0.",
            )


def find_backbone(model: nn.Module, blocks: str | None = None) -> Backbone:
    """Find a causal LM's decoder blocks by structure, through PEFT and other wrappers.

    The blocks are the outermost ``ModuleList`` with as many entries as the (text) config says the
    model has layers; where several fit, the one with a usual name wins.

    Args:
        model: a transformers causal LM, possibly wrapped (PEFT).
        blocks: dotted path of the block list for architectures this cannot work out.

    Raises:
        AFTError: encoder-decoder model, no such list, or more than one equally good.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise AFTError("Encoder-decoder models are not supported.", "Use a decoder-only (causal) model.")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden_size = getattr(text, "hidden_size", None)
    if blocks is not None:
        name, found = blocks, _by_path(model, blocks)
    else:
        depth = getattr(text, "decoder_layers", None) or getattr(text, "num_hidden_layers", None)
        name, found = _by_structure(model, depth)
    if not isinstance(hidden_size, int):
        raise AFTError(f"The config of {type(model).__name__} names no hidden_size.")
    return Backbone(name, list(found), hidden_size)


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, was compiled by ``torch.compile``."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def input_device(model: nn.Module) -> torch.device:
    """The device of a model's inputs: that of its first weights or, if offloaded, where they will run."""
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # some models do not say
        embedding = None
    place = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if place is None else torch.device(place)


def check_weights(model: nn.Module) -> None:
    """Raise `AFTError` for a model with weights that lie nowhere, rather than on disk or another device."""
    for name, module in model.named_modules():
        empty = any(each.device.type == "meta" for each in module.parameters(recurse=False))
        if empty and getattr(module, "_hf_hook", None) is None:
            raise AFTError(
                f"The model has no weights at {name or 'its top'}: they are on the meta device, which stores "
                "shapes alone, and nothing loads them for a pass.",
                "Load it with from_pretrained, not under init_empty_weights or torch.device('meta').",
            )


def cache_argument(model: nn.Module) -> str:
    """The keyword by which the model's ``forward`` takes a key-value cache.

    Read from its signature, so that a deprecated name is used only where there is no other. For wrappers
    that pass their arguments on (PEFT, compiled models), the wrapped model's signature is read.

    Raises:
        AFTError: the model takes no cache, or under an unknown name.
    """
    for module in model.modules():  # the model itself first, then what it wraps
        try:
            taken = inspect.signature(module.forward).parameters
        except (TypeError, ValueError):  # compiled code may have none
            continue
        for name in CACHE_ARGUMENTS:
            if name in taken:
                return name
        if "input_ids" in taken and not hasattr(module, "base_model"):
            break  # a complete model: its layers' signatures say nothing about its own
    raise AFTError(
        f"{type(model).__name__} takes no key-value cache under a known name "
        f"({' or '.join(CACHE_ARGUMENTS)}).",
        "Score it with fast=false, and upgrade lm-eval-aft if a new transformers renamed it.",
    )


def attention_kernel(model: nn.Module) -> str | None:
    """The attention implementation that a model's config names; ``UNTOLD`` where it has no such entry."""
    return getattr(getattr(model, "config", None), "_attn_implementation", UNTOLD)


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Raise `AFTError` for a model whose tokens attend to later ones: it would read the answer it scores.

    Only families that have both kinds say so in their config (``is_decoder``). Where it says no, a pass over
    two tokens decides, since some families set the switch on a copy of the config.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "is_decoder", True):
        return
    device = input_device(model)
    one, other = (model(input_ids=torch.tensor([[2, last]], device=device)).logits[0, 0] for last in (3, 4))
    if not torch.equal(one, other):
        raise AFTError(
            f"{type(model).__name__} is not causal according to its config: its tokens attend to later ones, "
            "so it would read the answer that it scores.",
            "Use a decoder-only model, or set is_decoder in its config if it was trained as one.",
        )


def _by_path(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise AFTError(
            f"{type(model).__name__} has no module {path!r}.", "Check the path with print(model)."
        ) from error
    if not isinstance(found, nn.ModuleList) or len(found) == 0:
        raise AFTError(f"{path!r} is a {type(found).__name__}, not a non-empty list of blocks.")
    return found


def _by_structure(model: nn.Module, depth: int | None) -> tuple[str, nn.ModuleList]:
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not nested:
            lists.append((name, module))
    fitting = [item for item in lists if depth is None or len(item[1]) == depth]
    named = [item for item in fitting if item[0].rpartition(".")[2] in _USUAL_NAMES]
    candidates = named or fitting
    if len(candidates) > 1:  # a vision tower may be as deep as the language model
        decoder = getattr(model, "get_decoder", lambda: None)()
        inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
        candidates = [item for item in candidates if id(item[1]) in inside] or candidates
    if depth is None and candidates:
        longest = max(len(blocks) for _, blocks in candidates)
        candidates = [item for item in candidates if len(item[1]) == longest]
    if len(candidates) != 1:
        seen = ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists) or "none"
        why = "several lists of modules fit" if candidates else f"no list of {depth} blocks was found"
        raise AFTError(
            f"Cannot tell where {type(model).__name__} keeps its decoder blocks: {why}. Lists seen: {seen}.",
            'Name the list yourself: blocks="path.to.layers".',
        )
    return candidates[0]


def final_norm(model: nn.Module, backbone: Backbone) -> nn.Module | None:
    """The norm between the last block and the output matrix; ``None`` where it cannot be told.

    It is the one module beside the list of blocks whose name is a norm's and not that of the embeddings'.
    """
    parent = model.get_submodule(backbone.name.rpartition(".")[0])
    found = [
        module
        for name, module in parent.named_children()
        if ("norm" in name or name == "ln_f") and "emb" not in name and isinstance(module, nn.Module)
    ]
    return found[0] if len(found) == 1 else None
