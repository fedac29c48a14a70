"""Which floating-point type a model trains vectors in, and how its smallest numbers are treated."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)
WORTHWHILE = 5_000_000  # parameters below which a CPU spends its time elsewhere than in products


def hardware_has_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are native, and so faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # On a CPU only tile registers (AMX) make up for the conversions.
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def to_training_dtype(model: nn.Module) -> torch.dtype:
    """Convert a loaded model, in place, to what trains fastest; return the dtype it has now.

    bfloat16 where the hardware multiplies it natively; float16 becomes float32 on a CPU, which has
    no fast arithmetic for it; everything else stays. Vectors are kept in float32 whatever the model
    is in, and log-softmax is taken in float32.
    """
    parameter = next(model.parameters())
    present, device = parameter.dtype, parameter.device
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) or present not in (torch.float32, torch.float16):
        return present
    wanted = present
    size = sum(each.numel() for each in model.parameters())
    if hardware_has_bf16(device) and (device.type == "cuda" or size >= WORTHWHILE):
        wanted = torch.bfloat16
    elif device.type == "cpu" and present == torch.float16:
        wanted = torch.float32
    if wanted != present:
        logger.info(
            "Training in %s; --dtype %s keeps the checkpoint's.",
            str(wanted).removeprefix("torch."),
            str(present).removeprefix("torch."),
        )
        _convert(model, wanted)
    return wanted


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert as loading in ``dtype`` would: rotary frequencies stay in float32.

    Rounded to 16 bits they shift positions, the more the further on.
    """
    rotary = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if "inv_freq" in name
    ]
    model.to(dtype)
    for module, name, buffer in rotary:
        setattr(module, name, buffer)


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Take numbers below the smallest normal one (1e-38 in float32) for zero inside the block.

    CPUs compute with such numbers many times more slowly, gradients of options all but ruled out are full
    of them, and no sum feels them. The calling thread goes back to what it did before.
    """
    probe = torch.full((1,), torch.finfo(torch.float32).tiny)
    before = bool((probe / 2 == 0).item())
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
