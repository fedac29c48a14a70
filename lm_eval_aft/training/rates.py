"""What documents cost, and what a protocol's stages come to at that price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lm_eval_aft.documents import Document
from lm_eval_aft.private_names import borrowed, require
from lm_eval_aft.training.fit import Candidate, Engine, in_steps
from lm_eval_aft.training.protocols import Stage

with borrowed("torch: torch.utils.flop_counter (flop_registry, register_flop_formula, sdpa_flop_count)"):
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


# The counter knows the attention kernels of GPUs only; these are the CPU's, which do the same products.
_KERNELS: dict[str, Any] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
CPU_ATTENTION: dict[Any, Any] = {
    getattr(torch.ops.aten, name): count for name, count in _KERNELS.items() if hasattr(torch.ops.aten, name)
}
# Without them, or if attention runs others, counts would be too low: asked for wherever something is counted.
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
        """What is left when a part of the work is left out; timings may jitter, so never below nothing."""
        return Spent(max(0.0, self.seconds - part.seconds), max(0.0, self.flops - part.flops))


# Does some work, and says what it took.
Meter = Callable[[Callable[[], None]], Spent]


@dataclass(frozen=True)
class Rates:
    """What one document costs.

    Attributes:
        train_shared: the frozen pass that all candidates of a seed start from, trained on.
        train_own: one candidate's own part, mean over layers.
        selection_shared, selection_own: the same, judged on.
    """

    train_shared: Spent
    train_own: Spent
    selection_shared: Spent
    selection_own: Spent

    def total(self, stages: Sequence[Stage], seeds: int) -> Spent:
        """What a protocol's stages come to at most; in the final one each seed has a pass of its own."""
        found = Spent()
        for stage in stages:
            passes = min(seeds, stage.candidates) if stage.name == "final" else 1
            trained = self.train_shared * passes + self.train_own * stage.candidates
            judged = self.selection_shared + self.selection_own * stage.candidates
            found = found + (trained * stage.train + judged * stage.selection) * stage.epochs
        return found


def measure_rates(
    engine: Engine,
    group: Sequence[Candidate],
    train: Sequence[Document],
    selection: Sequence[Document],
    meter: Meter,
) -> Rates:
    """Carry a few documents through the engine, with a group of candidates and with none."""

    def trained(candidates: Sequence[Candidate]) -> Spent:
        # What a method computes without training costs no step.
        steps, live = list(in_steps(train, 1)), [each for each in candidates if each.trained]
        return meter(lambda: engine.train(live, steps, _nothing))

    def judged(candidates: Sequence[Candidate]) -> Spent:
        return meter(lambda: _evaluate(engine, candidates, selection))

    shared_train, shared_selection = trained([]), judged([])
    own_train = trained(group).without(shared_train) * (1 / len(group))
    own_selection = judged(group).without(shared_selection) * (1 / len(group))
    per_train, per_selection = 1 / len(train), 1 / len(selection)
    return Rates(
        shared_train * per_train,
        own_train * per_train,
        shared_selection * per_selection,
        own_selection * per_selection,
    )


def flops_of(work: Callable[[], None]) -> int:
    """Floating-point operations of matrix products and attention, as `FlopCounterMode` counts them."""
    require(COUNTED_ATTENTION)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return int(counter.get_total_flops())


def _evaluate(engine: Engine, candidates: Sequence[Candidate], documents: Sequence[Document]) -> None:
    engine.evaluate(candidates, documents, _nothing)


def _nothing(_done: int) -> None:
    pass
