"""Models on the meta device, and how long a simulated device would take over their operations.

Every operation takes as long as its arithmetic or its memory traffic, whichever is longer, and at least
the time it takes to issue it (the roofline model: Williams, Waterman and Patterson, 2009,
doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lm_eval_aft._util.private_names import borrowed, require
from lm_eval_aft.engine.batching import Batch, TokenizedDocument
from lm_eval_aft.steering.backbone import Backbone, find_backbone
from lm_eval_aft.training.cost import COUNTED_ATTENTION, CPU_ATTENTION, Spent
from lm_eval_aft.training.objectives import Objective
from lm_eval_aft.training.selection import Score
from lm_eval_aft.training.trainer import Trajectory

with borrowed("torch: torch.utils._python_dispatch.TorchDispatchMode, torch.utils._pytree.tree_leaves"):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Device:
    """The speed and memory that an accelerator (or this machine's CPU) reaches in practice."""

    name: str
    kind: str  # ``cuda`` or ``cpu``: whose attention kernels are used
    flops: float  # operations a second in large matrix products, in the model's dtype
    bandwidth: float  # bytes a second to and from its memory
    memory: float  # bytes
    overhead: float  # seconds to issue one operation


def gpu(name: str, tflops: float, gigabytes_a_second: float, gigabytes: float) -> Device:
    """A GPU from its data sheet (dense bfloat16, fp32 accumulation).

    Assumes, without measuring, that eager PyTorch reaches 60 % of the arithmetic and 80 % of the bandwidth
    and issues an operation in 10 microseconds.
    """
    return Device(name, "cuda", 0.6e12 * tflops, 0.8e9 * gigabytes_a_second, 1e9 * gigabytes, overhead=10e-6)


DEVICES = {
    "24gb": gpu("NVIDIA GeForce RTX 4090, 24 GB", 165.2, 1008, 24),
    "80gb": gpu("NVIDIA A100 SXM, 80 GB", 312, 2039, 80),
}


def this_cpu(dtype: torch.dtype = torch.float32) -> Device:
    """This machine's processor with torch's current number of threads, measured in about a second.

    Its memory bandwidth is that of a copy too large for the cache.
    """
    a, b = torch.randn(256, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    big, small = torch.ones(2**24), torch.ones(4)
    product = _best(lambda: torch.mm(a, b), 10)
    copy = _best(lambda: big.clone(), 5)
    issue = _best(lambda: [small.add(1) for _ in range(1000)], 5) / 1000
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1] / product
    installed = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device("this CPU", "cpu", flops, 2 * big.nbytes / copy, installed, issue)


def _best(work: Callable[[], Any], rounds: int) -> float:
    """Least process CPU time of several rounds, so that other processes on the same cores do not count."""
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return max(min(taken), 1e-9)


# Of their first argument these read only what they return.
_PICKING = ("embedding", "index", "index_select", "gather")


class Roofline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside a ``with`` block, adds up in ``spent`` what the operations would take on a device.

    Tensors may be on the meta device, as only shapes count. What runs on the CPU for a GPU is free.

    Args:
        known: what operations on tensors of some shapes took and made before, to be read and added to:
            torch's own way to their results' shapes is slow.
    """

    def __init__(self, device: Device, known: KnownOperations | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.spent: Spent = Spent()
        self._known = {} if known is None else known
        self._flops = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        key = _key((func, args, kwargs))
        if key in self._known:
            seconds, flops, made = self._known[key]
            self.spent = self.spent + Spent(seconds, flops)
            return func(*args, **(kwargs or {})) if made is None else made()
        output = func(*args, **(kwargs or {}))
        spent = self._cost(func, args, kwargs, output)
        self.spent = self.spent + spent
        if key is not None:
            self._known[key] = (spent.seconds, spent.flops, _maker(output, tree_leaves((args, kwargs))))
        return output

    def _cost(self, func: Any, args: Any, kwargs: Any, output: Any) -> Spent:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        if not any(each.is_meta for each in (*given, *made)):
            return Spent()
        count = self._flops.get(func.overloadpacket)
        flops = float(count(*args, **(kwargs or {}), out_val=output)) if count else 0.0
        read = 0 if func.overloadpacket.__name__ in _PICKING else _size(given)
        traffic = read + _size(made) if given else 0
        seconds = max(flops / self.device.flops, traffic / self.device.bandwidth, self.device.overhead)
        return Spent(seconds, flops)


# By operation and shapes: seconds, floating-point operations, and what makes its result anew.
KnownOperations = dict[Any, tuple[float, float, Callable[[], Any] | None]]


def _key(value: Any) -> Any:
    """What an operation's cost and its result's shape depend on; ``None`` where that is not shapes alone."""
    kind = type(value)
    if isinstance(value, Tensor):
        if not value.is_meta:
            return None
        return (value.shape, value.stride(), value.dtype, value.untyped_storage().nbytes())
    if kind in (tuple, list):
        parts = tuple(_key(each) for each in value)
        return None if any(each is None for each in parts) else (kind, parts)
    if kind is dict:
        return _key(tuple(value.items()))
    return (kind, value)


def _maker(output: Any, given: Sequence[Any]) -> Callable[[], Any] | None:
    """Makes results of the same shapes; ``None`` where they are no tensors, or arguments of the operation."""
    several = isinstance(output, tuple)
    outputs = output if several else (output,)
    if any(each is one for each in outputs for one in given):
        return None
    if not all(isinstance(each, Tensor) and each.is_meta for each in outputs):
        return None
    shapes = [(each.shape, each.stride(), each.dtype) for each in outputs]

    def make() -> Any:
        made = [torch.empty_strided(*each[:2], dtype=each[2], device="meta") for each in shapes]
        return tuple(made) if several else made[0]

    return make


def _size(tensors: list[Tensor]) -> int:
    """Bytes of the tensors' storage; an expanded tensor has only those of what it repeats."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


@contextmanager
def shapes_only(kind: str) -> Iterator[None]:
    """Inside the block, attention on the meta device uses the kernels of a ``cuda`` or ``cpu`` device.

    By default it would allocate a score for every pair of tokens, which those kernels do not. And where code
    asks whether something holds for all of a tensor (finite gradients, for example), the answer is yes.
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
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and (args[0] if args else given["query"]).is_meta:
            return _attention(self._kind, *args, **given)
        return func(*args, **given)  # attention on a real device: the check that `Roofline` makes


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


# Models on the meta device, and the engine on them: all of a run's work, without its values.


def meta_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal LM that a transformers config describes, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def shallower(config: Any, depth: int) -> Any:
    """The same config with ``depth`` blocks."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return cut


def blocks_alike(model: nn.Module, tokens: int | None = None) -> bool:
    """Whether all blocks do the same work: the same parameters, and one type of layer.

    Args:
        tokens: of the longest row; where no sliding window cuts it, layers with and without one are alike.
    """
    config = getattr(model, "config", None)
    types = set(getattr(config, "layer_types", None) or [""])
    if tokens is not None and tokens <= (getattr(config, "sliding_window", None) or 0):
        types = {"full_attention" if each == "sliding_attention" else each for each in types}
    shapes = [[(n, p.shape) for n, p in block.named_parameters()] for block in find_backbone(model).blocks]
    return len(types) == 1 and all(each == shapes[0] for each in shapes)


class MetaObjective(Objective):
    """An objective that does all the work and returns a meaningless score."""

    def __init__(self, inner: Objective) -> None:
        self._inner = inner
        self.name, self.metric = inner.name, inner.metric

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """As the objective's own."""
        return self._inner.losses(logits, batch)

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """Zeros, after all the work."""
        # The last thing an objective does is to copy values to the CPU, and meta tensors have none.
        with suppress(NotImplementedError):
            self._inner.outcomes(logits, batch)
        return [np.zeros(1) for _ in batch.documents]

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        """A score of nothing."""
        return Score(0.0, 0.0, 0.0, 1.0, len(outcomes))


class MetaEngine(Trajectory):
    """The fast engine on a meta-device model, keeping the frozen output of every block."""

    def __init__(
        self, model: nn.Module, backbone: Backbone, objective: Objective, *, packed: bool, budget: int
    ) -> None:
        super().__init__(model, backbone, MetaObjective(objective), packed=packed, budget=budget)
        self._frozen: dict[torch.Size, dict[int, Any]] = {}
        self._laid_out: dict[tuple[TokenizedDocument, ...], list[Batch]] = {}
        self._remembers = False

    def lay_out(self, documents: Sequence[TokenizedDocument]) -> int:
        """Make the batches of these documents once and keep them; the bytes of the largest."""
        key = tuple(documents)
        if key not in self._laid_out:
            self._laid_out[key] = list(super().batches(documents))
        return max(sum(t.nbytes for t in batch.inputs.values()) for batch in self._laid_out[key])

    def batches(self, documents: Sequence[TokenizedDocument]) -> Iterator[Batch]:
        """As the engine's, made beforehand, so that making them is not counted as the device's time."""
        self.lay_out(documents)
        return iter(self._laid_out[tuple(documents)])

    def outputs(self, batch: Batch, layers: Collection[int]) -> dict[int, Any]:
        """The frozen model's output at every block."""
        shape = batch.inputs["input_ids"].shape
        if not (self._remembers and shape in self._frozen):
            self._frozen[shape] = super().outputs(batch, range(len(self.backbone.blocks)))
        return self._frozen[shape]

    @contextmanager
    def from_nothing(self) -> Iterator[None]:
        """Inside the block no frozen pass has been made yet; its own are dropped at the end."""
        before, self._frozen = self._frozen, {}
        yield
        self._frozen = before

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside the block, a frozen pass over rows of a shape seen before costs nothing."""
        self._remembers = True
        yield
        self._remembers = False
