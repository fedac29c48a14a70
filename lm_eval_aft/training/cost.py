"""The cost of a run, estimated from a few of its documents: time, floating-point operations, memory."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lm_eval_aft._util.private_names import borrowed, require
from lm_eval_aft.engine.batching import TokenizedDocument, units
from lm_eval_aft.training.candidate import Candidate, Engine, in_steps
from lm_eval_aft.training.recipe import Stage

with borrowed("torch: torch.utils._python_dispatch.TorchDispatchMode, torch.utils._pytree.tree_leaves"):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

SAMPLE = 4  # documents timed


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors alive at once inside a ``with`` block; ``peak`` is the most.

    Tensors made before the block do not count; memory that kernels use for themselves is not seen.

    Args:
        only: count the tensors of this type of device alone.
    """

    def __init__(self, only: str | None = None) -> None:
        require("torch: UntypedStorage._cdata")
        super().__init__()  # type: ignore[no-untyped-call]
        self._only = only
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and self._only in (None, leaf.device.type):
                self._count(leaf.untyped_storage(), [a for a in tree_leaves(args) if isinstance(a, Tensor)])
        return output

    def _count(self, storage: torch.UntypedStorage, inputs: Sequence[Tensor]) -> None:
        key = storage._cdata
        if key in self._known or any(key == each.untyped_storage()._cdata for each in inputs):
            return
        size = storage.nbytes()
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def freed() -> None:
            self._known.discard(key)
            self.alive -= size

        weakref.finalize(storage, freed)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measure a block's peak memory above what was in use before; call the result for the bytes.

    On CUDA by the allocator's count. Elsewhere by `PeakMemory` and, on Linux, by resident memory too,
    whichever is more: the former does not see what libraries allocate for themselves, the latter not what
    an allocator reuses.
    """
    gc.collect()  # garbage is not in use
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device)) - before
        return
    resident = 0
    if watched := os.access(_FORGET_PEAK, os.W_OK):
        resident = _status("VmRSS")
        _FORGET_PEAK.write_text("5")
    with PeakMemory() as memory:
        yield lambda: max(memory.peak, _status("VmHWM") - resident if watched else 0)


_FORGET_PEAK = Path("/proc/self/clear_refs")  # writing 5 sets VmHWM to VmRSS (Linux, proc(5))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


@dataclass(frozen=True)
class Estimate:
    """What a run will cost at most.

    Attributes:
        seconds: wall-clock time on this machine, as busy as it is now.
        flops: floating-point operations in matrix products and attention.
        peak_bytes: memory above the loaded weights.
    """

    seconds: float
    flops: float
    peak_bytes: int


def estimate(
    engine: Engine,
    group: Sequence[Candidate],
    train: Sequence[TokenizedDocument],
    selection: Sequence[TokenizedDocument],
    *,
    stages: Sequence[Stage] = (),
    batch_size: int = 1,
    seeds: int = 1,
) -> Estimate:
    """Run a few documents through a candidate at every layer and extrapolate.

    Time and operations come from documents spread over the range of lengths, memory from the
    step with the longest ones.

    Args:
        group: a candidate at each layer, which will be trained.
        seeds: with how many the final stage trains its candidates.
    """
    device = next(iter(group[0].intervention.tensors.values())).device
    with peak_memory(device) as peak:
        heaviest_passes(engine, group, train, selection, batch_size)
        peak_bytes = peak()  # read here: what follows is heavier than the run
    total = measure_rates(engine, group, _spread(train), _spread(selection)).total(stages, seeds)
    return Estimate(total.seconds, total.flops, peak_bytes)


def heaviest_passes(
    engine: Engine,
    group: Sequence[Candidate],
    train: Sequence[TokenizedDocument],
    selection: Sequence[TokenizedDocument],
    batch_size: int,
) -> None:
    """A step on the longest training documents and the largest batch of selection documents."""
    longest = next(iter(in_steps(_flat(reversed(_by_length(train))), batch_size)))
    selection = _flat(reversed(_by_length(selection)))
    first_batch = max(1, getattr(engine, "budget", 0) // selection[0].tokens(True), len(units(selection)[0]))
    engine.train([each for each in group if each.trained], [longest], _nothing)
    engine.evaluate(group, selection[:first_batch], _nothing)


def _spread(documents: Sequence[TokenizedDocument]) -> list[TokenizedDocument]:
    """A few documents, with their groups, evenly spread over the range of lengths."""
    together = _by_length(documents)
    n = min(max(2, SAMPLE // len(together[0])), len(together))
    return _flat(together[round((i + 0.5) / n * len(together) - 0.5)] for i in range(n))


def _by_length(documents: Sequence[TokenizedDocument]) -> list[list[TokenizedDocument]]:
    """Documents by group, those with the longest document last."""
    together = [[documents[i] for i in unit] for unit in units(documents)]
    return sorted(together, key=lambda unit: max(document.tokens(True) for document in unit))


def _flat(groups: Iterable[list[TokenizedDocument]]) -> list[TokenizedDocument]:
    return list(chain.from_iterable(groups))


# Cost per document, and the total over a protocol's stages.

with borrowed("torch: torch.utils.flop_counter (flop_registry, register_flop_formula, sdpa_flop_count)"):
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


# The counter knows the attention kernels of GPUs only; these are the CPU's, with the same products.
_KERNELS: dict[str, Any] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
CPU_ATTENTION: dict[Any, Any] = {
    getattr(torch.ops.aten, name): count for name, count in _KERNELS.items() if hasattr(torch.ops.aten, name)
}
# Without them, or if attention runs others, counts would be too low: checked wherever something is counted.
COUNTED_ATTENTION = "torch: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu and its backward"


@dataclass(frozen=True)
class Spent:
    """Seconds and floating-point operations (in matrix products and attention) of some work."""

    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.flops + other.flops)

    def __mul__(self, factor: float) -> Spent:
        return Spent(self.seconds * factor, self.flops * factor)

    def without(self, part: Spent) -> Spent:
        """This without a part of the work; timings jitter, so never below zero."""
        return Spent(max(0.0, self.seconds - part.seconds), max(0.0, self.flops - part.flops))


@dataclass(frozen=True)
class Rates:
    """What one document costs.

    Attributes:
        train_shared: in training, the frozen pass that all candidates of a seed share.
        train_own: one candidate's own part, mean over layers.
        selection_shared, selection_own: the same in evaluation.
    """

    train_shared: Spent
    train_own: Spent
    selection_shared: Spent
    selection_own: Spent

    def total(self, stages: Sequence[Stage], seeds: int) -> Spent:
        """The total over a protocol's stages, at most; in the final one each seed has its own frozen pass."""
        found = Spent()
        for stage in stages:
            passes = min(seeds, stage.candidates) if stage.name == "final" else 1
            shared = self.train_shared * (passes * stage.train) + self.selection_shared * stage.selection
            own = self.train_own * stage.train + self.selection_own * stage.selection
            epochs = 1 if stage.reuses_frozen else stage.epochs
            found = found + shared * epochs + own * (stage.candidates * stage.epochs)
        return found


def measure_rates(
    engine: Engine,
    group: Sequence[Candidate],
    train: Sequence[TokenizedDocument],
    selection: Sequence[TokenizedDocument],
) -> Rates:
    """Run a few documents through the engine, with a group of candidates and with none."""

    def trained(candidates: Sequence[Candidate]) -> Spent:
        # Methods without training take no steps.
        live = [each for each in candidates if each.trained]
        return _measured(lambda: engine.train(live, list(in_steps(train, 1)), _nothing)) * (1 / len(train))

    def judged(candidates: Sequence[Candidate]) -> Spent:
        return _measured(lambda: engine.evaluate(candidates, selection, _nothing)) * (1 / len(selection))

    shared_train, shared_selection = trained([]), judged([])
    return Rates(
        shared_train,
        trained(group).without(shared_train) * (1 / len(group)),
        shared_selection,
        judged(group).without(shared_selection) * (1 / len(group)),
    )


def _measured(work: Callable[[], object]) -> Spent:
    started = time.perf_counter()
    work()
    return Spent(time.perf_counter() - started, flops_of(work))


def flops_of(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention, as `FlopCounterMode` counts them."""
    require(COUNTED_ATTENTION)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return int(counter.get_total_flops())


def _nothing(_done: int) -> None:
    pass
