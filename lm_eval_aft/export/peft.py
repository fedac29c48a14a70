"""The vector as a PEFT adapter, and bias adapters made by others as vectors."""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import appearing
from lm_eval_aft._util.private_names import gone
from lm_eval_aft.export.base import (
    CONVERT,
    RECORD_NAME,
    Agreement,
    Base,
    Export,
    ExportJob,
    assign_model,
    compare_logits,
    hooked_logits,
    identity,
    load_base,
    optional_package,
    probe_logits,
    probe_prompts,
    read_record,
    require_agreement,
    restore,
    same_base,
    write_card,
)
from lm_eval_aft.export.merged import find_bias_slots, module_of, require_slots
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import FILE_NAME

_WEIGHTS = "adapter_model.safetensors"
_WHY_NOT = {
    "IA3": " It multiplies keys, values and the inside of the MLP, which neither an added vector nor the "
    "method scale, at a block's output, can do.",
    "LN_TUNING": " It replaces weights of the norms, inside the blocks.",
    "PROMPT_TUNING": " It adds tokens to the prompt.",
    "PREFIX_TUNING": " It adds keys and values to the cache.",
}
_TENSOR = re.compile(r"base_model\.model\.(.+)\.(beft_bias|lora_A\.weight|lora_B\.weight|lora_B\.bias)")


def write(job: ExportJob) -> Export:
    """Write an adapter folder that ``PeftModel.from_pretrained`` and lm-eval's ``peft=`` load.

    The vector becomes the bias of a BEFT adapter on the Linear that writes into the residual stream;
    on GPT-2's Conv1D, which BEFT does not know, that of a rank-1 LoRA whose matrices are zero.

    Raises:
        AFTError: peft is missing, no Linear can stand for the vector, or the check fails.
    """
    base, shifts, progress = job.base, job.shifts, job.progress
    with optional_package("peft", "Adapters"):
        import peft
    if base.args.get("peft"):
        raise AFTError(
            f"{base.name} has the adapter {base.args['peft']} already, and lm-eval's peft= takes one.",
            "Use --to merged, which writes the adapter and the vector into one checkpoint, or --to steered.",
        )
    progress("looking for a place")
    slot = require_slots(base, min(shifts))[0]
    names = {layer: f"{base.backbone.name}.{layer}.{slot.name}" for layer in shifts}
    linear = all(isinstance(module_of(base.backbone, layer, slot), nn.Linear) for layer in shifts)
    progress("base model's logits")
    prompts = probe_prompts(base.config)
    plain, steered = probe_logits(base.model, prompts), hooked_logits(base, shifts, prompts)
    # "no bias term, cannot merge": nothing is merged by peft.
    with appearing(job.target, 10**6) as folder, warnings.catch_warnings(action="ignore"):
        progress("writing")
        config = _config(peft, sorted(names.values()), linear)
        model = peft.get_peft_model(base.model, config)
        values = {names[layer]: delta / slot.scale for layer, delta in shifts.items()}
        try:
            _fill(model.base_model.model, values, linear)
        except (AttributeError, KeyError, TypeError) as error:
            raise gone("peft: BeftConfig, beft_bias, lora_A and lora_B of adapted layers", error) from error
        config.base_model_name_or_path, config.revision = base.path, base.revision
        config.inference_mode = True
        model.save_pretrained(folder, safe_serialization=True)
        plain_again = model.unload()
        progress("reloading")
        loaded = peft.PeftModel.from_pretrained(plain_again, str(folder)).eval()
        agreement = require_agreement(
            compare_logits(plain, steered, probe_logits(loaded, prompts)), "adapter"
        )
        loaded.unload()
        kind = "a BEFT adapter" if linear else "a LoRA adapter (zero matrices, lora_bias)"
        notes = [f"{kind} on {', '.join(names.values())}", *same_base(base), *_resizing(base, steered)]
        how = {"stored": "as a PEFT adapter", "library_name": "peft", "relation": "adapter"}
        write_card(job, folder, [*notes, str(agreement)], **how)
    return Export(job.target, "peft", agreement, notes)


def _resizing(base: Base, logits: list[Tensor]) -> list[str]:
    """A note where lm-eval will resize the model's embeddings, as it does under ``peft=`` alone."""
    rows = base.config.get_text_config().vocab_size
    tokens = rows if base.tokenizer is None else len(base.tokenizer)
    if tokens == rows:
        return []
    told = (
        f"lm-eval's peft= resizes the embeddings of this model, {rows:,} rows, to its tokenizer's {tokens:,} "
        "tokens, with any adapter"
    )
    if tokens > rows:
        return [f"{told}: the new rows take a share of the probability. --to merged has none of this"]
    cut = max(float((each.logsumexp(-1) - each[..., :tokens].logsumexp(-1)).max()) for each in logits)
    return [
        f"{told}: log-likelihoods rise by up to {cut:.1e} on probe prompts, as the rows cut off lose their "
        "share of the probability. Compare with a baseline under another adapter, or use --to merged"
    ]


def read(
    source: Path, model: str | None, args: Mapping[str, Any], progress: Callable[[str], None]
) -> tuple[SteeringVector, list[str]]:
    """The vector in an adapter folder, and notes; ``model`` defaults to the one its config names.

    Raises:
        AFTError: not an adapter that adds constants, pickled, damaged, or for another model.
    """
    config = read_config(source)
    biases, own = read_biases(source), read_record(source)
    if model is None:
        model = config.get("base_model_name_or_path")
        args = {**args, "revision": args.get("revision") or config.get("revision")}
    if not model:
        raise AFTError("The adapter does not name its base model.", "Give --model.")
    progress(f"loading {model}")
    base = load_base(model, args)
    known = identity(base)  # before peft wraps the Linears
    shifts, agreement = read_adapter(base, source, biases, progress)
    described = {"format": "peft", "peft_type": config["peft_type"]}
    vector = SteeringVector(shifts, metadata={"imported_from": described})
    notes = [f"{config['peft_type']} on blocks {', '.join(map(str, shifts))}", str(agreement)]
    notes += restore(vector, own, RECORD_NAME)
    return vector, notes + assign_model(vector, known)


def read_adapter(
    base: Base, folder: Path, biases: dict[str, Tensor], progress: Callable[[str], None]
) -> tuple[dict[int, Tensor], Agreement]:
    """What an adapter adds after blocks, given what `read_biases` found.

    Returns:
        0-based block -> fp32 tensor of shape ``(hidden_size,)``, and the comparison of its logits with
        the adapter's own.

    Raises:
        AFTError: it acts on Linears that do not write into the residual stream, or peft cannot load it.
    """
    with optional_package("peft", "Adapters"):
        import peft
    progress("looking for a place")
    shifts: dict[int, Tensor] = {}
    for module, bias in biases.items():
        found = re.fullmatch(rf"{re.escape(base.backbone.name)}\.([0-9]{{1,9}})\.(.+)", module)
        if found is None or int(found[1]) >= len(base.backbone.blocks):
            raise AFTError(f"The adapter acts on {module}, which is in no block of {base.name}.")
        layer, name = int(found[1]), found[2]
        slots = {slot.name: slot for slot in find_bias_slots(base.model, base.backbone, layer)}
        if name not in slots:
            raise AFTError(
                f"The adapter's bias on {module} does not move the output of block {layer} by a constant, so "
                "it is not a steering vector.",
                f"In this block only {', '.join(slots) or 'no Linear'} would do.",
            )
        if bias.shape != (base.backbone.hidden_size,):
            raise AFTError(f"The adapter's bias on {module} has shape {tuple(bias.shape)}.")
        shifts[layer] = shifts.get(layer, torch.zeros_like(bias)) + bias * slots[name].scale
    progress("comparing logits")
    prompts = probe_prompts(base.config)
    plain, steered = probe_logits(base.model, prompts), hooked_logits(base, shifts, prompts)
    with warnings.catch_warnings(action="ignore"):
        try:
            loaded = peft.PeftModel.from_pretrained(base.model, str(folder)).eval()
        except Exception as error:  # a stranger's config: peft may fail on any entry
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise AFTError(
                f"peft cannot load the adapter in {folder}: {reason}.", "Save it again."
            ) from error
        agreement = compare_logits(plain, probe_logits(loaded, prompts), steered)
        loaded.unload()
    return shifts, require_agreement(agreement, "vector")


def _config(peft: Any, targets: list[str], linear: bool) -> Any:
    if linear:
        if not hasattr(peft, "BeftConfig"):
            raise AFTError("This peft has no BEFT adapters.", "Upgrade it: pip install -U peft")
        return peft.BeftConfig(target_modules=targets, task_type="CAUSAL_LM")
    return peft.LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=targets,
        lora_bias=True,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, Tensor], linear: bool) -> None:
    for name, value in values.items():
        layer: Any = model.get_submodule(name)
        if linear:
            parameter = layer.beft_bias["default"]
            # In fp32 whatever the model's dtype: the sum is rounded once.
            parameter.data = value.reshape(1, -1).clone()
        else:
            for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
                matrix.weight.data = torch.zeros_like(matrix.weight, dtype=torch.float32)
            layer.lora_B["default"].bias.data = value.clone()


def read_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``, with the entries that an import uses checked.

    Raises:
        AFTError: missing, damaged, or of an adapter that adds no constant.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        hint = "Give the adapter's folder, or the .gguf or .json file itself."
        if (folder / FILE_NAME).is_file():
            hint = "It is a vector folder of this package: give it as it is, as --vector."
        elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            hint = f"Its .bin or .pt files, as of pyreft, are pickles, which are never opened. {CONVERT}"
        raise AFTError(f"{folder} is not a PEFT adapter: it has no adapter_config.json.", hint)
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AFTError(f"{file} cannot be read: {error}.", "Download it again.") from error
    if not isinstance(config, dict):
        raise AFTError(f"{file} is not a mapping.", "Download it again.")
    kind = config.get("peft_type")
    if kind not in ("BEFT", "LORA"):
        why = _WHY_NOT.get(str(kind), "")
        raise AFTError(
            f"{folder} holds a {kind} adapter; only constants can become a vector.{why}",
            "BEFT adapters can, and LoRA adapters whose matrices are zero and that have lora_bias.",
        )
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise AFTError(f"{file} has {config[key]!r:.80} for {key}; expected text.", "Correct it.")
    if kind == "LORA":
        _scaling(config, file)
    return config


def _scaling(config: dict[str, Any], file: Path) -> float:
    """What a LoRA's output is multiplied by."""
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < 1e9):  # type: ignore[operator]
            raise AFTError(f"{file} has {value!r:.80} for {key}; expected a number above 0.", "Correct it.")
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise AFTError("DoRA adapters and LoRA adapters with rank patterns are not read.")
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)


def read_biases(folder: Path) -> dict[str, Tensor]:
    """Module path -> its constant, read from the files alone; nothing is unpickled."""
    config, weights = read_config(folder), folder / _WEIGHTS
    if not weights.is_file():
        raise AFTError(
            f"{folder} has no {_WEIGHTS}.",
            "Adapters saved as .bin are pickles, which can run code: ask for them as safetensors.",
        )
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise AFTError(f"{folder} cannot be read: {error}.", "Download it again.") from error
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise AFTError(
                f"The adapter holds {name}, which is not a constant that it adds.",
                "Biases trained with bias='all' or 'lora_only' replace the model's own: use lora_bias."
                if name.endswith(".bias")
                else "",
            )
        parts[found[1]][found[2]] = tensor
    scaling = _scaling(config, folder / "adapter_config.json") if config["peft_type"] == "LORA" else 1.0
    return {module: _constant(module, part, scaling) for module, part in parts.items()}


def _constant(module: str, found: dict[str, Tensor], scaling: float) -> Tensor:
    if "beft_bias" in found:
        return found["beft_bias"].reshape(-1)
    matrices = (found.get("lora_A.weight"), found.get("lora_B.weight"))
    if "lora_B.bias" not in found or any(m is None for m in matrices):
        raise AFTError(f"The LoRA on {module} has no bias, so it adds no constant.")
    if all(bool(m.any()) for m in matrices if m is not None):
        raise AFTError(
            f"The LoRA on {module} has matrices that are not zero: what it adds depends on the input.",
            "Only constants can become a vector.",
        )
    return found["lora_B.bias"].reshape(-1) * scaling
