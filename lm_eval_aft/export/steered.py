"""Vectors as the ``.pt`` file that lm-eval's own ``--model steered`` reads."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import appearing
from lm_eval_aft._util.private_names import borrowed
from lm_eval_aft.export.base import (
    Base,
    Export,
    ExportJob,
    compare_logits,
    probe_prompts,
    require_agreement,
    same_base,
)
from lm_eval_aft.steering.hooks import add_all


def export_steered(job: ExportJob) -> Export:
    """Write the file and compare logits through lm-eval's own loader, in the model's own dtype.

    Raises:
        AFTError: the blocks lie outside the base model that lm-eval hooks, or the check fails.
    """
    base, shifts, progress = job.base, job.shifts, job.progress
    wanted = {id(base.backbone.blocks[layer]): layer for layer in shifts}
    modules = base.model.base_model.named_modules()  # lm-eval's names begin there, with an adapter too
    points = {wanted[id(module)]: name for name, module in modules if id(module) in wanted}
    if points.keys() != shifts.keys():
        raise AFTError(f"lm-eval's steered model cannot reach {base.backbone.name}.", "Use --to peft.")
    content = {
        points[layer]: {"steering_vector": delta, "steering_coefficient": 1.0, "action": "add"}
        for layer, delta in shifts.items()
    }
    progress("base model's logits")
    # Only the short ones: lm-eval's call returns the logits of every position.
    prompts = probe_prompts(base.config)[:1]
    with torch.no_grad():
        plain = [base.model(input_ids=ids, use_cache=False).logits for ids in prompts]
        # lm-eval rounds the vector to the model's dtype, as the hook does where activations have it too.
        with add_all(base.backbone, {layer: delta.to(base.model.dtype) for layer, delta in shifts.items()}):
            steered = [base.model(input_ids=ids, use_cache=False).logits for ids in prompts]
    with appearing(job.target, 10**6) as file:
        progress("writing")
        # Not straight into the file: on a full disk torch raises RuntimeError, or nothing before 2.10.
        buffer = BytesIO()
        torch.save(content, buffer)
        file.write_bytes(buffer.getvalue())
        progress("reloading")
        exported = _loaded_logits(base, file, prompts)
        sides = ([logits.float() for logits in side] for side in (plain, steered, exported))
        agreement = require_agreement(compare_logits(*sides), "file")
    return Export(
        job.target, "steered", agreement, [f"it hooks {', '.join(points.values())}", *same_base(base)]
    )


def _loaded_logits(base: Base, file: Path, prompts: list[Tensor]) -> list[Tensor]:
    call = "lm-eval: SteeredModel._model_call"
    with borrowed(call):
        from lm_eval.models.hf_steered import SteeredModel

    if base.tokenizer is None:
        raise AFTError(f"{base.name} has no tokenizer, which lm-eval needs.")
    lm: Any = SteeredModel(base.model, str(file), device="cpu", tokenizer=base.tokenizer)
    with borrowed(call):
        ask = lm._model_call
    try:
        with torch.no_grad():
            return [ask(ids) for ids in prompts]
    except TypeError as error:  # its hook takes tensors and tuples
        raise AFTError(
            f"lm-eval's steered model cannot hook blocks of {base.config.model_type} ({error}).",
            "Score it with `--model aft`, or use --to merged or --to peft.",
        ) from error
