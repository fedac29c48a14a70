"""Where a plain checkpoint can keep the vector: a bias that is there, a switch, or another architecture.

Biases and switches are found by structure, whatever the family; only rewritings are a table. Nothing here
is trusted: every export is reloaded and compared with the hooked model.
"""

from __future__ import annotations

import copy
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.export.plan import HOOK_INSTEAD, PEFT_INSTEAD, Plan, skeleton, unchanged
from lm_eval_aft.export.rewritings import NO_FAMILY, REWRITINGS
from lm_eval_aft.export.slots import Slot

# Config switches that give a family's Linears biases. Those other than ours become zeros.
_SWITCHES = ("mlp_bias", "use_bias", "bias", "enable_bias", "attention_bias")


def plan_merge(model: Any, slots: list[Slot]) -> Plan:
    """Find a place for the vector in a plain checkpoint.

    Args:
        slots: what `find_slots` found in the vector's first block.

    Raises:
        AFTError: there is none, with the reason and what to use instead.
    """
    config = model.config
    family = config.model_type
    refuse_mixture(config)
    if getattr(model, "hf_quantizer", None) is not None:
        raise AFTError("A quantised model cannot take a merged vector.", "Merge into the original weights.")
    if not slots:
        raise AFTError(no_slot(model), HOOK_INSTEAD)
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
            new = set(parameter_names(changed)) - names
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


def parameter_names(config: Any) -> list[str]:
    """Names of the tensors that a checkpoint of this config holds; nothing is allocated."""
    return list(skeleton(config).state_dict())


def refuse_mixture(config: Any) -> None:
    """Raise `AFTError` for a mixture of experts, which has no one Linear that writes for every token."""
    text = config.get_text_config()
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if (getattr(text, key, None) or 0) > 1:
            raise AFTError(
                f"{config.model_type} is a mixture of experts ({key}={getattr(text, key)}): each token "
                "passes through other Linears, weighted by a router, so no bias equals the vector.",
                HOOK_INSTEAD,
            )


def no_slot(model: Any) -> str:
    """Why no bias of a block can stand for the vector."""
    family = model.config.model_type
    if family == "opt" and not model.config.do_layer_norm_before:
        where = "normalises the residual stream itself after each sublayer"
    else:
        where = "normalises, gates or scales what its last Linear writes before adding it"
    return (
        f"No bias in a block of {family} equals the vector: the block {where} (post-norm), so a constant "
        "before it does not stay a constant."
    )
