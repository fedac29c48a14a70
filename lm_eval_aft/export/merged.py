"""A plain checkpoint with the vector folded into a bias: any engine serves it at no cost."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_eval_aft.errors import AFTError
from lm_eval_aft.export.base import Base, source_file
from lm_eval_aft.export.card import write_card
from lm_eval_aft.export.families import plan_merge
from lm_eval_aft.export.plan import Plan, skeleton
from lm_eval_aft.export.provenance import write_record
from lm_eval_aft.export.report import Export, Progress
from lm_eval_aft.export.slots import find_slots
from lm_eval_aft.export.target import appearing
from lm_eval_aft.export.verify import Agreement, compare, probe_logits, probe_prompts, require
from lm_eval_aft.vector import SteeringVector

SHARD_SIZE = "5GB"
# The share of the vector's norm that rounding to the checkpoint's dtype may move it by.
MOST_ROUNDING = 0.05
_ROUNDED = 2.0**-22  # below, float32's own


def export_merged(
    base: Base, vector: SteeringVector, deltas: dict[int, Tensor], target: Path, progress: Progress
) -> Export:
    """Write a checkpoint that plain transformers loads and that computes what the steered model does.

    A bias of 16 bits rounds the vector. The check is against what the dtype stores; how far that is from
    the vector itself is measured and told beside.

    The base model is released before the export is loaded for its check, so memory holds one of them
    at a time.

    Args:
        deltas: what is added after each block: fp32, shape ``(hidden_size,)``, coefficient included.

    Raises:
        AFTError: the family has no place for the vector; rounding moves it too far; the place cannot be
            written; the check fails.
    """
    progress("looking for a place")
    plan = plan_merge(base.model, find_slots(base.model, base.backbone, min(deltas)))
    model, stored = build(base, plan, deltas)
    rounding, dtype = _relative_error(stored, deltas), str(model.dtype).removeprefix("torch.")
    _refuse_rounded_away(rounding, dtype)
    progress("base model's logits")
    prompts = probe_prompts(base.config)
    plain = probe_logits(base.model, prompts)
    with base.steered(stored):
        steered = probe_logits(base.model, prompts)
    exact = steered
    if rounding > _ROUNDED:
        with base.steered(deltas):
            exact = probe_logits(base.model, prompts)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with appearing(target, size) as folder:
        progress("writing")
        _save(base, model, folder)
        tokenizer = base.tokenizer
        del model
        base.release()
        gc.collect()
        progress("reloading")
        exported = _reloaded_logits(folder, prompts)
        agreement = require(compare(plain, steered, exported), "merged checkpoint")
        _check_tokenizer(tokenizer, folder)
        notes = [f"{plan.route}; dtype {dtype}"]
        if rounding > _ROUNDED:
            notes.append(_rounding_told(rounding, dtype, compare(plain, exact, exported)))
        if tokenizer is None:
            notes.append(f"no tokenizer was found with {base.name}, so the checkpoint has none")
        if plan.caution:
            notes.append(plan.caution)
        write_record(folder, vector, deltas)
        write_card(folder, "merged", base, vector, [*notes, str(agreement)])
    return Export(target, "merged", agreement, notes)


def _refuse_rounded_away(rounding: float, dtype: str) -> None:
    if not rounding <= MOST_ROUNDING:
        raise AFTError(
            f"Rounding to {dtype}, the checkpoint's dtype, would move the vector by {_percent(rounding)} of "
            "its norm: its entries are too small beside the biases they are added to. "
            f"{_percent(MOST_ROUNDING)} is the limit.",
            "Use --to peft, or save the base model in float32 and give that folder as --model.",
        )


def _rounding_told(rounding: float, dtype: str, unrounded: Agreement) -> str:
    return (
        f"rounding to {dtype} moved the vector by {_percent(rounding)} of its norm: from the vector before "
        f"rounding, logits differ by at most {unrounded.difference:.1e} (the vector itself changes them by "
        f"{unrounded.effect:.1e}); the check below is against the vector as rounded"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def build(base: Base, plan: Plan, deltas: dict[int, Tensor]) -> tuple[Any, dict[int, Tensor]]:
    """The export as a model that shares the base's weights, and what it really adds after each block.

    The vector is rounded once, when it is stored; what is returned is the stored bias less the one
    that was there, in fp32, so that rounding is not mistaken for a fault.
    """
    dtype = base.model.dtype
    model = skeleton(plan.config, dtype)
    state = dict(plan.convert(iter(base.model.state_dict().items())))
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in state and name.endswith(".bias"):
            state[name] = torch.zeros(tensor.shape, dtype=dtype)
    stored = {}
    for layer, delta in deltas.items():
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
            stored[layer] = stored[layer] + deltas[layer].mean()
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
    """The export must read text as the base model does, though its architecture may be another."""
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


def _relative_error(stored: dict[int, Tensor], deltas: dict[int, Tensor]) -> float:
    off = sum(float((stored[layer] - deltas[layer]).double().square().sum()) for layer in deltas)
    norm = sum(float(delta.double().square().sum()) for delta in deltas.values())
    return math.sqrt(off / max(norm, 1e-300))
