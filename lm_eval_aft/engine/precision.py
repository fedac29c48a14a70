"""The dtype that vectors are trained in, and weights reordered for fast CPU kernels."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft._util.private_names import NAMES, borrowed
from lm_eval_aft.steering.backbone import Conv1D
from lm_eval_aft.steering.fingerprint import is_quantized

logger = logging.getLogger(__name__)
HALVES = (torch.bfloat16, torch.float16)
WORTHWHILE = 5_000_000  # with fewer parameters a CPU spends most of its time outside matrix products


def hardware_has_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are native, and so faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # Tile registers (AMX), or vector instructions for it (AVX512-BF16: about twice float32's rate).
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def to_training_dtype(model: nn.Module) -> torch.dtype:
    """Convert a loaded model, in place, to what trains fastest; return the dtype it has now.

    bfloat16 where the hardware multiplies it natively; float16 becomes float32 on a CPU, which has
    no fast arithmetic for it; everything else stays, quantised and offloaded models among it. Vectors are
    kept in float32 whatever the model is in, and log-softmax is taken in float32.
    """
    parameter = next(model.parameters())
    present, device = parameter.dtype, parameter.device
    offloaded = any(each.is_meta for each in model.parameters())
    if is_quantized(model) or offloaded:
        return present
    if present not in (torch.float32, torch.float16):
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
def computed_in_float32(model: nn.Module) -> Iterator[None]:
    """Passes inside the block compute in float32 from the model's own 16-bit weights.

    Each module's weights are widened while it runs, so that no second model is needed in memory: the weights
    are exact, and what is left of the rounding is float32's. Modules whose weights are not plain 16-bit
    numbers (quantised ones) compute as ever.
    """
    kept: dict[nn.Parameter, Tensor] = {}

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in HALVES:
                kept[parameter] = parameter.data
                parameter.data = parameter.data.float()
        return tuple(map(wide, args)), {key: wide(value) for key, value in kwargs.items()}

    def after(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in kept:
                parameter.data = kept.pop(parameter)

    def restore() -> None:
        for parameter, data in kept.items():
            parameter.data = data

    with ExitStack() as hooks:
        hooks.callback(restore)
        for module in model.modules():
            if any(parameter.dtype in HALVES for parameter in module.parameters(recurse=False)):
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after, always_call=True).remove)
        yield


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Treat subnormal numbers (below 1e-38 in float32) as zero inside the block.

    CPUs compute with them many times more slowly, gradients of nearly impossible options are full of them,
    and they change no sum. Afterwards the calling thread's setting is restored.
    """
    probe = torch.full((1,), torch.finfo(torch.float32).tiny)
    before = bool((probe / 2 == 0).item())
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


# A frozen model's weights in the memory layout of oneDNN's kernels, which makes products 1.2 to several times
# as fast. Reordering costs a copy and pays within a few passes. Sums are taken in another order, so results
# differ by rounding.

with borrowed("torch: torch.utils.flop_counter (flop_registry, register_flop_formula, sdpa_flop_count)"):
    from torch.utils.flop_counter import flop_registry, register_flop_formula

# Weights of more bytes than this are not reordered: the copies take as many again.
MOST_BYTES = 2 << 30
_KERNELS = "torch: torch.ops.mkldnn._linear_pointwise, _reorder_linear_weight"
# Rows that the layout is optimised for; any number works.
_ROWS = 256

Forward = Callable[[Tensor], Tensor]


class ReorderedWeights:
    """Copies of a model's fp32 weights on a CPU, and passes that multiply with them (`in_use`).

    Layers that are not plainly `torch.nn.Linear` or transformers' `Conv1D` (quantised, replaced, offloaded)
    stay as they are, as do all of them elsewhere than on x86, and those of models too large (`MOST_BYTES`).
    Weights changed later are not noticed: make it anew.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [(m, w) for m in model.modules() if (w := _weight(m)) is not None] if _served(model) else []
        # Layers may share a weight.
        weights = {(weight.data_ptr(), weight.shape): weight for _, weight in layers}
        if sum(weight.nbytes for weight in weights.values()) > MOST_BYTES:
            layers, weights = [], {}
        reordered = {place: _reorder(weight) for place, weight in weights.items()}
        self._forwards = [
            (module, _product(reordered[weight.data_ptr(), weight.shape], module.bias))
            for module, weight in layers
        ]

    def __len__(self) -> int:
        """How many layers multiply with reordered weights."""
        return len(self._forwards)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Passes made inside the block use these weights; hooks on the layers run as ever."""
        for module, forward in self._forwards:
            module.forward = forward
        try:
            yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)


def _served(model: nn.Module) -> bool:
    compiled = hasattr(model, "_orig_mod")  # would be compiled anew for every change of a layer
    here = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return here and not compiled and not NAMES[_KERNELS].problem()


def _weight(module: nn.Module) -> Tensor | None:
    """The weight (outputs, inputs) of a layer that may be served; None for any other module."""
    if type(module) not in (nn.Linear, Conv1D) or "forward" in module.__dict__:
        return None
    weight: Any = module.weight
    bias: Any = module.bias
    for tensor in (weight, weight if bias is None else bias):
        plain = type(tensor) in (nn.Parameter, Tensor)
        if not plain or tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.numel():
            return None
    found: Tensor = weight.detach()
    return found if type(module) is nn.Linear else found.t()


def _reorder(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return found


def _product(weight: Tensor, bias: Any) -> Forward:
    bias = None if bias is None else bias.detach()

    def forward(inputs: Tensor) -> Tensor:
        shape, rows = inputs.shape[:-1], inputs.shape[:-1].numel()
        flat = inputs.reshape(rows, inputs.shape[-1])
        if (wanted := round_up(rows)) > rows:
            given, flat = flat, flat.new_empty(wanted, flat.shape[1])
            flat[:rows] = given
            flat[rows:] = 0
        flat = flat.contiguous()
        found: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
        return found[:rows].view(*shape, found.shape[-1])

    return forward


def round_up(rows: int) -> int:
    """``rows`` rounded up, by 1/16 or 7 at most: oneDNN compiles and keeps code for each number of rows."""
    step = max(8, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


_COUNTED = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if _COUNTED is not None and _COUNTED not in flop_registry:

    @register_flop_formula(_COUNTED)
    def _operations(inputs: Any, weight: Any, *_args: Any, **_kwargs: Any) -> int:
        """FLOPs of one product, for PyTorch's counter, which does not know this operator."""
        found: int = 2 * math.prod(inputs[:-1]) * math.prod(weight)
        return found
