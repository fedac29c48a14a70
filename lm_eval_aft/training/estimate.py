"""What a run will cost, from a few of its own documents: time, floating-point operations, memory."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_eval_aft.documents import Document, units
from lm_eval_aft.private_names import borrowed, require
from lm_eval_aft.training.fit import Candidate, Engine, in_steps
from lm_eval_aft.training.protocols import Stage
from lm_eval_aft.training.rates import Spent, flops_of, measure_rates

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
    whichever is more: the one does not see what libraries take for themselves, the other not what an
    allocator hands out again.
    """
    gc.collect()  # what only waits to be freed is not in use
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
    train: Sequence[Document],
    selection: Sequence[Document],
    stages: Sequence[Stage],
    batch_size: int,
    seeds: int = 1,
) -> Estimate:
    """Run a few documents through a candidate at every layer and extrapolate.

    Time and operations come from documents spread over the range of lengths, memory from the
    step with the longest ones.

    Args:
        group: a candidate at each layer, which will be trained.
        seeds: with how many the final stage trains its candidates.
    """
    with peak_memory(_device(group)) as peak:
        heaviest_passes(engine, group, train, selection, batch_size)
        peak_bytes = peak()  # read here: what follows is heavier than the run

    def meter(work: Callable[[], None]) -> Spent:
        return Spent(_seconds(work), flops_of(work))

    total = measure_rates(engine, group, _spread(train), _spread(selection), meter).total(stages, seeds)
    return Estimate(total.seconds, total.flops, peak_bytes)


def heaviest_passes(
    engine: Engine,
    group: Sequence[Candidate],
    train: Sequence[Document],
    selection: Sequence[Document],
    batch_size: int,
) -> None:
    """A step on the longest training documents and the largest batch of selection documents."""

    def nothing(_done: int) -> None:
        pass

    longest = next(iter(in_steps(_longest_first(train), batch_size)))
    judged = _longest_first(selection)
    together = max(1, getattr(engine, "budget", 0) // _tokens(judged[0]), len(units(judged)[0]))
    engine.train([each for each in group if each.trained], [longest], nothing)
    engine.evaluate(group, judged[:together], nothing)


def _device(group: Sequence[Candidate]) -> torch.device:
    return next(iter(group[0].intervention.tensors.values())).device


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _tokens(document: Document) -> int:
    return document.tokens(True)


def _spread(documents: Sequence[Document]) -> list[Document]:
    """A few documents, with their groups, evenly spread over the range of lengths."""
    together = sorted(_by_unit(documents), key=_longest)
    n = min(max(2, SAMPLE // len(together[0])), len(together))
    places = [round((i + 0.5) / n * len(together) - 0.5) for i in range(n)]
    return [document for place in places for document in together[place]]


def _longest_first(documents: Sequence[Document]) -> list[Document]:
    together = sorted(_by_unit(documents), key=_longest, reverse=True)
    return [document for unit in together for document in unit]


def _by_unit(documents: Sequence[Document]) -> list[list[Document]]:
    return [[documents[i] for i in unit] for unit in units(documents)]


def _longest(unit: Sequence[Document]) -> int:
    return max(map(_tokens, unit))
