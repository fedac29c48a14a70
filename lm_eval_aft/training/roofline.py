"""A device that is not there: how long operations on shapes alone would take on it.

Every operation takes as long as its arithmetic or its memory traffic, whichever is longer, and at least
the time it takes to issue it (the roofline model: Williams, Waterman and Patterson, 2009,
doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lm_eval_aft.private_names import borrowed, require
from lm_eval_aft.training.rates import COUNTED_ATTENTION, CPU_ATTENTION, Spent

with borrowed("torch: torch.utils._python_dispatch.TorchDispatchMode, torch.utils._pytree.tree_leaves"):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Device:
    """What an accelerator (or this machine's CPU) reaches in practice.

    Attributes:
        kind: ``cuda`` or ``cpu``: whose attention kernels are used.
        flops: operations a second in large matrix products, in the model's dtype.
        bandwidth: bytes a second to and from its memory.
        memory: bytes.
        overhead: seconds to issue one operation.
    """

    name: str
    kind: str
    flops: float
    bandwidth: float
    memory: float
    overhead: float


def gpu(name: str, tflops: float, gigabytes_a_second: float, gigabytes: float) -> Device:
    """A GPU from its data sheet (dense bfloat16, fp32 accumulation).

    Six tenths of the arithmetic and eight tenths of the bandwidth are taken to be reached, and 10
    microseconds an operation, as eager PyTorch commonly does: assumptions, not measurements.
    """
    return Device(name, "cuda", 0.6e12 * tflops, 0.8e9 * gigabytes_a_second, 1e9 * gigabytes, overhead=10e-6)


DEVICES = {
    "24gb": gpu("NVIDIA GeForce RTX 4090, 24 GB", 165.2, 1008, 24),
    "80gb": gpu("NVIDIA A100 SXM, 80 GB", 312, 2039, 80),
}


def this_cpu(dtype: torch.dtype = torch.float32) -> Device:
    """This machine's processor with as many threads as torch now uses, measured in about a second.

    Its memory bandwidth is that of a copy out of cache.
    """
    a, b = torch.randn(256, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    big, small = torch.ones(2**24), torch.ones(4)
    product = _best(lambda: torch.mm(a, b), 10)
    copy = _best(lambda: big.clone(), 5)
    issue = _best(lambda: [small.add(1) for _ in range(1000)], 5) / 1000
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1] / product
    return Device("this CPU", "cpu", flops, 2 * big.nbytes / copy, _installed(), issue)


def _best(work: Callable[[], Any], rounds: int) -> float:
    """Least process CPU time of several rounds: others' work on the same cores does not count."""
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return max(min(taken), 1e-9)


def _installed() -> float:
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


# They read of their first argument only what they return.
_PICKING = ("embedding", "index", "index_select", "gather")


class Roofline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up, inside a ``with`` block, what the operations would take on a device: ``spent``.

    Tensors may be on the meta device: only shapes count. What runs on the CPU for a GPU is free.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.spent: Spent = Spent()
        self._flops = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        if func.is_view or not any(each.is_meta for each in (*given, *made)):
            return output
        count = self._flops.get(func.overloadpacket)
        flops = float(count(*args, **(kwargs or {}), out_val=output)) if count else 0.0
        read = 0 if func.overloadpacket.__name__ in _PICKING else _size(given)
        traffic = read + _size(made) if given else 0
        seconds = max(flops / self.device.flops, traffic / self.device.bandwidth, self.device.overhead)
        self.spent = self.spent + Spent(seconds, flops)
        return output


def _size(tensors: list[Tensor]) -> int:
    """Bytes behind tensors; an expanded one has only those of what it repeats."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


@contextmanager
def shapes_only(kind: str) -> Iterator[None]:
    """Inside the block, attention on the meta device uses the kernels of a ``cuda`` or ``cpu`` device.

    Left alone it would write out every pair of tokens, which those kernels do not. And where code asks
    whether all of something holds (finite gradients, rows that are one sequence), the answer is yes.
    """
    require(COUNTED_ATTENTION)
    with _Kernels(kind):
        yield


class _Kernels(TorchFunctionMode):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attention(self._kind, *args, **(kwargs or {}))


def _attention(
    kind: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.scaled_dot_product_attention``, by a fused kernel."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if kind == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    else:
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        with borrowed("torch: torch.ops.aten._scaled_dot_product_efficient_attention"):
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        found = kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)
    result: Tensor = found[0]
    return result
