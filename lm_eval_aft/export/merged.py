"""A plain checkpoint with the vector folded into a bias: any engine serves it at no cost."""

from __future__ import annotations

import copy
import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import appearing
from lm_eval_aft.export.base import (
    Base,
    Export,
    ExportJob,
    compare_logits,
    forward_in_float32,
    hooked_logits,
    probe_logits,
    probe_prompts,
    require_agreement,
    source_file,
    write_card,
)
from lm_eval_aft.export.rewritings import (
    HOOK_INSTEAD,
    NO_FAMILY,
    PEFT_INSTEAD,
    REWRITINGS,
    Plan,
    skeleton,
    unchanged,
)
from lm_eval_aft.steering.backbone import Backbone, Conv1D, find_backbone
from lm_eval_aft.steering.fingerprint import is_quantized
from lm_eval_aft.steering.hooks import add_at, hidden_states

SHARD_SIZE = "5GB"
# The share of the vector's norm that rounding to the checkpoint's dtype may move it by.
MOST_ROUNDING = 0.05
_ROUNDED = 2.0**-22  # below, float32's own


def write(job: ExportJob) -> Export:
    """Write a checkpoint that plain transformers loads and that computes what the steered model does.

    A 16-bit bias rounds the vector. The check is against the rounded vector; its distance from the vector
    itself is reported in the notes. The base model is released before the export is loaded, so that only one
    of them is in memory at a time.

    Raises:
        AFTError: the family has no place for the vector; rounding moves it too far; ``target`` cannot be
            written; the check fails.
    """
    base, shifts, progress = job.base, job.shifts, job.progress
    prompts, moved = probe_prompts(base.config), []
    if base.args.get("peft"):
        moved = [_merge_adapter(base, shifts, prompts)]
    progress("looking for a place")
    plan = plan_merge(base.model, require_slots(base, min(shifts)))
    model, stored = build(base, plan, shifts)
    rounding, dtype = _relative_error(stored, shifts), str(model.dtype).removeprefix("torch.")
    if not rounding <= MOST_ROUNDING:
        raise AFTError(
            f"Rounding to {dtype}, the checkpoint's dtype, would move the vector by {_percent(rounding)} of "
            "its norm: its entries are too small beside the biases they are added to. "
            f"{_percent(MOST_ROUNDING)} is the limit.",
            "Use --to peft, or save the base model in float32 and give that folder as --model.",
        )
    progress("base model's logits")
    plain, steered = probe_logits(base.model, prompts), hooked_logits(base, stored, prompts)
    exact = hooked_logits(base, shifts, prompts) if rounding > _ROUNDED else steered
    size = sum(parameter.nbytes for parameter in model.parameters())
    with appearing(job.target, size) as folder:
        progress("writing")
        _save(base, model, folder)
        tokenizer = base.tokenizer
        del model
        base.release()
        gc.collect()
        progress("reloading")
        exported = _reloaded_logits(folder, prompts)
        agreement = require_agreement(compare_logits(plain, steered, exported), "merged checkpoint")
        _check_tokenizer(tokenizer, folder)
        notes = [f"{plan.route}; dtype {dtype}", *moved]
        if rounding > _ROUNDED:
            unrounded = compare_logits(plain, exact, exported)
            notes.append(
                f"rounding to {dtype} moved the vector by {_percent(rounding)} of its norm: from the vector "
                f"before rounding, logits differ by at most {unrounded.difference:.1e} (the vector itself "
                f"changes them by {unrounded.effect:.1e}); the check below is against the vector as rounded"
            )
        if tokenizer is None:
            notes.append(f"no tokenizer was found with {base.name}, so the checkpoint has none")
        if plan.caution:
            notes.append(plan.caution)
        how = {"stored": "folded into its weights", "library_name": "transformers", "relation": "finetune"}
        write_card(job, folder, [*notes, str(agreement)], **how)
    return Export(job.target, "merged", agreement, notes)


def _merge_adapter(base: Base, shifts: dict[int, Tensor], prompts: list[Tensor]) -> str:
    """Turn a base with an adapter into a plain model; a note on how far that moves its logits."""
    with_adapter = hooked_logits(base, shifts, prompts)
    try:
        base.model = base.model.merge_and_unload()
    except Exception as error:  # each kind of adapter has reasons of its own
        raise AFTError(
            f"The adapter {base.args['peft']} cannot be merged into its model: {str(error)[:200]}.",
            "Use --to gguf or --to steered, which leave the model as it is.",
        ) from error
    base.backbone = find_backbone(base.model, base.backbone.name.removeprefix("base_model.model."))
    agreement = compare_logits(with_adapter, with_adapter, hooked_logits(base, shifts, prompts))
    return (
        f"the adapter {base.args['peft']} was merged into the weights first, which moves logits by at most "
        f"{agreement.difference:.1e}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def build(base: Base, plan: Plan, shifts: dict[int, Tensor]) -> tuple[Any, dict[int, Tensor]]:
    """The export as a model that shares the base's weights, and what it actually adds after each block.

    The latter is the stored bias minus the original one, in fp32: rounded once, when it was stored, so that
    rounding is not mistaken for an error of the export.
    """
    dtype = base.model.dtype
    model = skeleton(plan.config, dtype)
    state = dict(plan.convert(iter(base.model.state_dict().items())))
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in state and name.endswith(".bias"):
            state[name] = torch.zeros(tensor.shape, dtype=dtype)
    stored = {}
    for layer, delta in shifts.items():
        name = f"{base.backbone.name}.{layer}.{plan.slot}.bias"
        if name not in wanted:
            raise AFTError(f"The export has no {name}: blocks of this model differ in structure.")
        if plan.centred:
            delta = delta - delta.mean()
        before = state[name].float()
        after = (before + delta / plan.scale).to(state[name].dtype)
        if not bool(torch.isfinite(after).all()):
            raise AFTError(
                f"The vector at layer {layer} overflows {dtype}.", "Export from weights of another dtype."
            )
        state[name] = after
        stored[layer] = (after.float() - before) * plan.scale
        if plan.centred:
            stored[layer] = stored[layer] + shifts[layer].mean()
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise AFTError(
            f"{plan.config.model_type} cannot hold this model's tensors: missing {sorted(missing)[:3]}, "
            f"not wanted {sorted(unexpected)[:3]}.",
            "Use --to peft.",
        )
    model.tie_weights()
    return model, stored


def _save(base: Base, model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    if base.tokenizer is not None:
        base.tokenizer.save_pretrained(folder)
    # As it is: transformers refuses to save some that it reads.
    generation = source_file(base, "generation_config.json")
    if generation is not None:
        (folder / "generation_config.json").write_bytes(generation.read_bytes())


def _reloaded_logits(folder: Path, prompts: list[Tensor]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    return probe_logits(model, prompts)


def _check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raise `AFTError` unless the export tokenizes text as the base model does."""
    if tokenizer is None:
        return
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = ["Question: What is 7 + 48?\nAnswer:", "  The quick brown fox — naïve, 北京.\n\n\tdef f(x):"]
    same = all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in texts)
    same = same and again.get_vocab() == tokenizer.get_vocab()
    if not same or again.chat_template != tokenizer.chat_template:
        raise AFTError(
            "The merged checkpoint was deleted: its tokenizer does not read text as the base model's does.",
            "Use --to peft, which leaves the base model's tokenizer alone.",
        )


def _relative_error(stored: dict[int, Tensor], shifts: dict[int, Tensor]) -> float:
    off = sum(float((stored[layer] - shifts[layer]).double().square().sum()) for layer in shifts)
    norm = sum(float(delta.double().square().sum()) for delta in shifts.values())
    return math.sqrt(off / max(norm, 1e-300))


# Where a plain checkpoint can keep the vector: an existing bias, a config switch, or another architecture.
#
# Biases and switches are found by structure, whatever the family; only rewritings are a table. None of this
# is trusted: every export is reloaded and compared with the hooked model.

# Config switches that give a family's Linears biases. Those other than ours become zeros.
_SWITCHES = ("mlp_bias", "use_bias", "bias", "enable_bias", "attention_bias")


def plan_merge(model: Any, slots: list[BiasSlot]) -> Plan:
    """Find a place for the vector in a plain checkpoint.

    Args:
        slots: what `require_slots` found in the vector's first block.

    Raises:
        AFTError: there is none, with the reason and what to use instead.
    """
    config = model.config
    family = config.model_type
    if is_quantized(model):
        raise AFTError("A quantised model cannot take a merged vector.", "Merge into the original weights.")
    names = set(model.state_dict())
    for slot in slots:
        if any(name.endswith(f".{slot.name}.bias") for name in names):
            return Plan(config, slot.name, slot.scale, unchanged, f"the vector was added to {slot.name}.bias")
    for slot in slots:
        for switch in _SWITCHES:
            if getattr(config, switch, None) is not False:
                continue
            changed = copy.deepcopy(config)
            setattr(changed, switch, True)
            new = set(skeleton(changed).state_dict()) - names
            ours = any(name.endswith(f".{slot.name}.bias") for name in new)
            if ours and all(name.endswith(".bias") for name in new):
                route = (
                    f"the vector lies in {slot.name}.bias, there by {switch}=true; the other new biases are 0"
                )
                return Plan(changed, slot.name, slot.scale, unchanged, route)
    if family in REWRITINGS:
        return REWRITINGS[family](model)
    reason = NO_FAMILY.get(family, "no family that computes the same and has one is known")
    raise AFTError(
        f"{family} has no bias in {slots[0].name} that survives saving, and {reason}.", PEFT_INSTEAD
    )


def require_slots(base: Base, layer: int) -> list[BiasSlot]:
    """The slots of block ``layer``, at least one; see `find_bias_slots`.

    Raises:
        AFTError: no bias of the block can stand for the vector, with the reason.
    """
    family, text = base.config.model_type, base.config.get_text_config()
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if (getattr(text, key, None) or 0) > 1:
            raise AFTError(
                f"{family} is a mixture of experts ({key}={getattr(text, key)}): each token "
                "passes through other Linears, weighted by a router, so no bias equals the vector.",
                HOOK_INSTEAD,
            )
    slots = find_bias_slots(base.model, base.backbone, layer)
    if slots:
        return slots
    if family == "opt" and not base.config.do_layer_norm_before:
        where = "normalises the residual stream itself after each sublayer"
    else:
        where = "normalises, gates or scales what its last Linear writes before adding it"
    raise AFTError(
        f"No bias in a block of {family} equals the vector: the block {where} (post-norm), so a constant "
        "before it does not stay a constant.",
        HOOK_INSTEAD,
    )


# Where in a block a bias equals the vector: the last Linear that writes into the residual stream.

_TRIED = 3  # candidates of one block
_TOLERANCE = 1e-4  # relative to the probe; where it is wrong it is wrong by about 1


@dataclass(frozen=True)
class BiasSlot:
    """A Linear whose bias moves the block's output by a constant.

    Attributes:
        name: path inside the block, e.g. ``mlp.down_proj``.
        scale: how far the block's output moves per unit of bias; 1 but for residual multipliers.
    """

    name: str
    scale: float


@torch.no_grad()
def find_bias_slots(model: Any, backbone: Backbone, layer: int) -> list[BiasSlot]:
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
            found.append(BiasSlot(name, scale))
    return found


def module_of(backbone: Backbone, layer: int, slot: BiasSlot) -> nn.Module:
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
