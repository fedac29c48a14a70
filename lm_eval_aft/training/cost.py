"""The cost of a run, estimated from a few of its documents: time, floating-point operations, memory."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lm_eval_aft._util.private_names import borrowed, require
from lm_eval_aft.engine.attention import WORTHWHILE
from lm_eval_aft.engine.batching import (
    Batch,
    TokenizedDocument,
    continuation_logits,
    lay_out,
    token_budget_batches,
)
from lm_eval_aft.engine.precision import subnormals_flushed
from lm_eval_aft.engine.rows import PackedRow
from lm_eval_aft.steering.backbone import Backbone
from lm_eval_aft.steering.hooks import add_all, hidden_states, with_hidden_states
from lm_eval_aft.steering.intervention import CONTEXT
from lm_eval_aft.training.candidate import Candidate, in_steps
from lm_eval_aft.training.recipe import KEPT_BYTES, Protocol, Stage
from lm_eval_aft.training.trainer import Trajectory, by_length

logger = logging.getLogger(__name__)
with borrowed("torch: torch.utils._python_dispatch.TorchDispatchMode, torch.utils._pytree.tree_leaves"):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves


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
    """What a run will cost.

    Attributes:
        seconds: wall-clock time on this machine, as busy as it is now: the geometric mean of the next two.
        flops: floating-point operations in matrix products and attention, at most.
        peak_bytes: memory above the loaded weights.
        least, most: the time if everything that may stop early does, and if nothing does.
    """

    seconds: float
    flops: float
    peak_bytes: int
    least: float | None = None
    most: float | None = None


# Cost per document, and the total over a protocol's stages.

with borrowed("torch: torch.utils.flop_counter (flop_registry, register_flop_formula, sdpa_flop_count)"):
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, *_per_query_head(query, key, value)))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    shapes = (gradient, query, *_per_query_head(query, key, value))
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _per_query_head(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    """Shapes of keys and values as if each query head had its own, which torch 2.9 does not see by itself."""
    return (key[0], query[1], *key[2:]), (value[0], query[1], *value[2:])


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
        gradients: one pass with gradients for every layer; by default a step with its frozen pass.
    """

    train_shared: Spent
    train_own: Spent
    selection_shared: Spent
    selection_own: Spent
    gradients: Spent | None = None

    def total(self, stages: Sequence[Stage], seeds: int) -> Spent:
        """The total over a protocol's stages, at most; in the final one each seed has its own frozen pass."""
        found = Spent()
        for stage in stages:
            if stage.name == "pass":
                found = found + (self.gradients or self.train_shared + self.train_own) * stage.train
                continue
            passes = min(seeds, stage.candidates) if stage.name == "final" else 1
            shared = self.train_shared * (passes * stage.train) + self.selection_shared * stage.selection
            own = self.train_own * stage.train + self.selection_own * stage.selection
            epochs = 1 if stage.reuses_frozen else stage.epochs
            found = found + shared * epochs + own * (stage.candidates * stage.epochs)
        return found


def flops_of(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention, as `FlopCounterMode` counts them."""
    require(COUNTED_ATTENTION)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return int(counter.get_total_flops())


# What a document costs, from passes over a few. Blocks are much alike, so the uppermost tell what all of them
# take; and what they take does not depend on the hidden states they start from, so that no frozen pass is
# needed to time them.

# Seconds that measuring may take: a share of the run's own, within these bounds; the first level always may.
SHARE, LEAST, MOST = 0.02, 1.0, 8.0
# What may be measured, in turn: so many tokens and blocks, or what a typical pass has.
LEVELS = (
    *((tokens, 1) for tokens in (32, 128, 512, 2048, 8192, 32768)),
    (32768, 4),
    (32768, 16),
    (32768, 256),
)
STEADY = 0.02  # seconds over which a short pass is repeated
REFINED = 3  # steps that most refinements take at least, found on models of 0.1 to 135 million parameters
BESIDES = 1.0  # seconds that a run takes for other things: reading documents, writing files and a picture
COPIES = 5  # of a candidate's numbers: the vector, its gradient, two moments, the best so far
clock = time.perf_counter


@dataclass(frozen=True)
class Size:
    """What the cost of passes grows with.

    Attributes:
        tokens: rows x width, padding included.
        pairs: of tokens that attention compares.
        scored: positions at which the head is applied.
    """

    tokens: float
    pairs: float
    scored: float

    def __add__(self, other: Size) -> Size:
        return Size(self.tokens + other.tokens, self.pairs + other.pairs, self.scored + other.scored)

    def __mul__(self, factor: float) -> Size:
        return Size(self.tokens * factor, self.pairs * factor, self.scored * factor)

    @classmethod
    def of(cls, documents: Sequence[TokenizedDocument], packed: bool) -> Size:
        """Of one pass."""
        rows = lay_out(documents, packed)
        width = max(row.width for row in rows)
        in_parts = packed and min(row.prefix for row in rows) >= WORTHWHILE
        pairs = sum(_pairs(row) if in_parts else width**2 for row in rows)
        scored = sum(len({place for option in row.options for place in option.places}) for row in rows)
        return cls(len(rows) * width, pairs, scored)


def _pairs(row: PackedRow) -> int:
    """Pairs of tokens compared where attention runs part by part."""
    starts = [run.start for run in row.runs[1:] if run.role == CONTEXT] or [row.prefix]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], row.width], strict=True)]
    return int(row.prefix**2 + sum(each * (row.prefix + each) for each in lengths))


@dataclass(frozen=True)
class Passes:
    """The passes that a run makes of its training or its selection documents, each given by its documents.

    Attributes:
        mean: their size by document.
        largest: the size of the largest.
    """

    documents: list[list[TokenizedDocument]]
    packed: bool
    mean: Size
    largest: Size

    @classmethod
    def of(
        cls, documents: Sequence[TokenizedDocument], engine: Any, step: int | None = None, whole: int = 0
    ) -> Passes:
        """Passes over optimiser steps of ``step`` documents, or over all of them, the longest first.

        Args:
            whole: the number of documents of which these are a sample; the more, the less padding.
        """
        many = [
            document if document.group is None else replace(document, group=document.group + copy * 10**9)
            for copy in range(max(1, round(whole / len(documents))))
            for document in documents
        ]
        packed, budget = engine.packed, engine.budget
        steps = [by_length(many, packed)] if step is None else list(in_steps(many, step))
        found = [[one[i] for i in own] for one in steps for own in token_budget_batches(one, packed, budget)]
        sizes = [Size.of(each, packed) for each in found]
        total = reduce(Size.__add__, sizes)
        return cls(found, packed, total * (1 / len(many)), max(sizes, key=lambda size: size.tokens))

    @cached_property
    def typical(self) -> list[TokenizedDocument]:
        """The pass nearest to the mean size."""
        sizes = [Size.of(each, self.packed).tokens for each in self.documents]
        mean = sum(sizes) / len(sizes)
        return self.documents[min(range(len(sizes)), key=lambda i: abs(sizes[i] - mean))]

    def cut(self, tokens: float) -> list[TokenizedDocument]:
        """The typical pass, or as many tokens of it."""
        whole = Size.of(self.typical, self.packed).tokens
        return _cut(self.typical, min(tokens, whole), self.packed)


def _cut(documents: Sequence[TokenizedDocument], tokens: float, packed: bool) -> list[TokenizedDocument]:
    """The first of the documents, of about so many tokens; a single one that is longer is shortened."""
    taken = list(documents[:1])
    for document in documents[1:]:
        if Size.of([*taken, document], packed).tokens > tokens:
            break
        taken.append(document)
    share = tokens / Size.of(taken, packed).tokens
    if share >= 1 or len(taken) > 1:
        return taken
    pairs = tuple(
        (head[-max(1, int(len(head) * share)) :], tail[: max(1, int(len(tail) * share))])
        for head, tail in taken[0].pairs
    )
    return [replace(taken[0], pairs=pairs)]


class UpperBlocks(Trajectory):
    """The engine with hidden states of a few tokens, over and over, in place of those of frozen passes.

    Args:
        like: a document, whose frozen pass shows what a block returns.
        whole: do as the plain engine does, which runs all blocks for each candidate.
    """

    def __init__(
        self, *args: Any, like: TokenizedDocument, packed: bool = False, whole: bool = False
    ) -> None:
        super().__init__(*args, packed=packed, budget=1 if whole else None)
        self.whole = whole
        (batch, *_) = self.batches([like])
        self._output = None if whole else super().outputs(batch, [0])[0]

    def outputs(self, batch: Batch, layers: Collection[int]) -> dict[int, Any]:
        """The same at every layer."""
        if self.whole:
            return {}
        shape = batch.inputs["input_ids"].shape
        known = hidden_states(self._output).flatten(0, -2)
        places = torch.arange(shape.numel(), device=known.device) % len(known)
        hidden = known[places].view(*shape, known.shape[-1])
        return dict.fromkeys(layers, with_hidden_states(self._output, hidden))

    @contextmanager
    def steered(self, candidate: Candidate, outputs: dict[int, Any]) -> Iterator[None]:
        """As the engine's, or as the plain engine's."""
        with ExitStack() as stack:
            if self.whole:
                stack.enter_context(add_all(self.backbone, candidate.intervention.shifts()))
            else:
                stack.enter_context(super().steered(candidate, outputs))
            yield

    def step(self, candidate: Candidate, batch: Batch) -> None:
        """A training step of one candidate, forward and backward."""
        candidate.backward(self.objective.losses(self._logits(candidate, batch), batch).mean())
        candidate.step()

    @torch.no_grad()
    def read(self, candidate: Candidate, batch: Batch) -> list[Any]:
        """A candidate's outcomes, forward alone."""
        return self.objective.outcomes(self._logits(candidate, batch), batch)

    def bare_step(self, candidate: Candidate, batch: Batch) -> None:
        """As `step`, without the loss, and the head at one position only."""
        candidate.backward(self._logits(candidate, replace(batch, scored=batch.scored[:1])).sum())
        candidate.step()

    @torch.no_grad()
    def bare_read(self, candidate: Candidate, batch: Batch) -> None:
        """As `read`, likewise."""
        self._logits(candidate, replace(batch, scored=batch.scored[:1]))

    def _logits(self, candidate: Candidate, batch: Batch) -> Tensor:
        with self.steered(candidate, self.outputs(batch, [candidate.layer])):
            return continuation_logits(self.model, batch)


Work = Callable[[Candidate, Batch], object]


@dataclass(frozen=True)
class _Taken:
    """What a pass took; ``attention``: those of the operations that grow with pairs of tokens."""

    seconds: float = 0.0
    flops: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0

    def without(self, part: _Taken, times: float) -> _Taken:
        """What is left, divided; timings jitter, so never below zero."""
        both = zip(vars(self).values(), vars(part).values(), strict=True)
        return _Taken(*(max(0.0, mine - its) / times for mine, its in both))


@dataclass(frozen=True)
class _Fitted:
    """One kind of pass: what it takes around the blocks, and for each block, at the size measured.

    Attributes:
        spent: seconds that measuring it took.
        counted: where only seconds were measured, the same pass at the size whose operations were counted.
    """

    around: _Taken
    block: _Taken
    size: Size
    spent: float
    counted: _Fitted | None = None

    def __call__(self, size: Size, blocks: float, around: bool = True) -> Spent:
        """What passes of another size over so many blocks take."""
        known = self.counted or self
        flops, here = known._block_flops(size), known._block_flops(self.size)
        longer = size.tokens / self.size.tokens
        found = Spent(self.block.seconds * (flops / here if here else longer), flops) * blocks
        if not around:
            return found
        # The head is applied where something is scored; a whole pass (without blocks) grows with all tokens.
        wider = size.scored / self.size.scored if here else longer
        counted = size.scored / known.size.scored if here else size.tokens / known.size.tokens
        return found + Spent(self.around.seconds * wider, known.around.flops * counted)

    def _block_flops(self, size: Size) -> float:
        linear = (self.block.flops - self.block.attention) * size.tokens / self.size.tokens
        return linear + self.block.attention * size.pairs / self.size.pairs

    def bytes(self, size: Size, blocks: float) -> float:
        """Memory of such a pass, where so many blocks keep what they have allocated."""
        known = self.counted or self
        return (known.around.bytes + known.block.bytes * blocks) * size.tokens / known.size.tokens


@dataclass(frozen=True)
class Forecast:
    """A run whose cost is to be estimated.

    Attributes:
        probe: makes a candidate at a layer, as the run would.
        sites: the layers that get candidates.
        train, selection: the passes over the documents, or over a sample of them.
        judged: how many selection documents there are.
    """

    engine: UpperBlocks
    probe: Callable[[int], Candidate]
    sites: Sequence[int]
    train: Passes
    selection: Passes
    judged: int
    stages: Sequence[Stage]
    protocol: Protocol
    _counted: dict[str, _Fitted] = field(default_factory=dict)

    def estimate(self) -> Estimate:
        """Time ever larger passes, as long as there is time, and extrapolate.

        Raises:
            RuntimeError, TypeError, ...: the model's blocks cannot be run in this way.
        """
        started, level = clock(), LEVELS[0]
        found, seconds = self._measured(*level)
        typical = max(Size.of(each.typical, each.packed).tokens for each in (self.train, self.selection))

        def work(tokens: float, blocks: int) -> float:
            return min(tokens, typical) * max(1, self._most(blocks))

        while True:
            left = min(MOST, max(LEAST, SHARE * found.seconds)) - (clock() - started)
            growth = {each: work(*each) / work(*level) for each in LEVELS}
            larger = [each for each, more in growth.items() if more > 1 and more * seconds < left]
            if not larger:
                return found
            level = larger[-1]
            try:
                found, seconds = self._measured(*level)
            except RuntimeError as error:  # out of memory, where a run would take smaller batches
                logger.info("No larger pass was timed: %s", error)
                return found

    def _most(self, blocks: int) -> int:
        return 0 if self.engine.whole else min(blocks, len(self.engine.backbone.blocks) - 1)

    @subnormals_flushed()
    def _measured(self, tokens: float, blocks: int) -> tuple[Estimate, float]:
        """The estimate from passes of so many tokens and blocks at most, and how long those took."""
        engine, blocks = self.engine, self._most(blocks)
        weights = _weights(engine.backbone)
        probe = self.probe(len(weights) - 1)
        train, selection = (_batch(engine, each.cut(tokens)) for each in (self.train, self.selection))
        read = self._fitted("read", train, blocks)
        judge = self._fitted("judge", selection, blocks)
        step = self._fitted("step", train, blocks) if probe.trained else None
        laid_out = [
            _seconds(lambda: _batch(engine, each.documents)) / len(each.documents)  # noqa: B023
            for each in (train, selection)
        ]
        outcomes = engine.read(probe, selection)
        many = list(islice(cycle(outcomes), self.judged))
        summed = _seconds(lambda: engine.objective.summarise(many)) / self.judged

        above = [sum(weights[site + 1 :]) for site in self.sites]
        usual, lowest, every = sum(above) / len(above), max(above), sum(weights)
        frozen = read(self.train.mean, every, around=False) + Spent(laid_out[0])
        rates = Rates(
            frozen,
            step(self.train.mean, usual) if step else Spent(),
            Spent()
            if self._keeps_frozen()
            else judge(self.selection.mean, every, around=False) + Spent(laid_out[1]),
            judge(self.selection.mean, usual) + Spent(summed),
            frozen
            if step is None
            else step(self.train.mean, lowest) + read(self.train.mean, every - lowest, around=False),
        )
        timed = sum(each.spent for each in (read, judge, step) if each)
        baseline = judge(self.selection.mean, every) + Spent(laid_out[1])
        checks = judge(self._checked, every)
        return self._total(rates, baseline, checks, self._peak(step, read, judge, lowest)), timed

    def _keeps_frozen(self) -> bool:
        """Whether the baseline's pass over the selection documents serves all trials."""
        return (
            self.protocol.one_pass
            and self._frozen_bytes(self.selection.mean.tokens * self.judged) <= KEPT_BYTES
        )

    def _frozen_bytes(self, tokens: float) -> float:
        """Bytes of all sites' frozen outputs for so many tokens."""
        number = next(self.engine.model.parameters()).element_size()
        return len(self.sites) * self.engine.backbone.hidden_size * number * tokens

    @cached_property
    def _checked(self) -> Size:
        """The passes that choose the engine (`make_engine`): a few documents, packed and not."""
        packed = self.engine.packed
        ordered = by_length(
            [d for own in (*self.train.documents, *self.selection.documents) for d in own], packed
        )
        passes = [(ordered[:2], packed), (ordered[:2], False)] if packed else []
        passes += [(ordered[-1:], packed), (ordered[-1:], packed), (ordered[-1:], False)]
        return reduce(Size.__add__, (Size.of(*each) for each in passes))

    def _fitted(self, kind: str, batch: Batch, blocks: int) -> _Fitted:
        """What a kind of pass takes around the blocks and for each of them.

        The latter is found without most of what surrounds the blocks, in which a few of them would be lost.
        """
        engine, size = self.engine, Size.of(batch.documents, self.engine.packed)
        last, counted = len(engine.backbone.blocks) - 1, self._counted.get(kind)
        work, bare = (engine.step, engine.bare_step) if kind == "step" else (engine.read, engine.bare_read)

        def taken(work: Work, layer: int) -> _Taken:
            return self._taken(work, batch, layer, count=counted is None)

        if engine.whole:
            around, block = taken(work, last // 2), _Taken()
            spent = around.seconds
        else:
            around, without, upper = taken(work, last), taken(bare, last), taken(bare, last - blocks)
            block = upper.without(without, sum(_weights(engine.backbone)[last + 1 - blocks :]) or 1.0)
            spent = around.seconds + without.seconds + upper.seconds
        fitted = _Fitted(around, block, size, spent, counted)
        self._counted.setdefault(kind, fitted)
        return fitted

    def _taken(self, work: Work, batch: Batch, layer: int, count: bool) -> _Taken:
        candidate = self.probe(layer)
        if not count:
            return _Taken(_seconds(lambda: work(candidate, batch)))
        require(COUNTED_ATTENTION)
        device = next(self.engine.model.parameters()).device.type
        flops = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with flops as counter, PeakMemory(device) as memory:
            work(candidate, batch)
        counts = {str(name): count for name, count in counter.get_flop_counts().get("Global", {}).items()}
        attention = sum(count for name, count in counts.items() if "attention" in name)
        # Done twice, so that nothing that is slow only once is timed.
        seconds = _seconds(lambda: work(candidate, batch))
        return _Taken(seconds, float(sum(counts.values())), float(attention), float(memory.peak))

    def _total(self, rates: Rates, baseline: Spent, checks: Spent, peak_bytes: float) -> Estimate:
        stages, seeds = self.stages, self.protocol.seeds
        most = rates.total(stages, seeds)
        least = rates.total([replace(each, epochs=self._fewest(each)) for each in stages], seeds)
        # Each part of the selection documents has its baseline; with one pass there is one part.
        sizes = {self.judged} | {stage.selection for stage in stages if not self.protocol.one_pass}
        once = baseline.seconds * sum(sizes) + checks.seconds + BESIDES
        fewest, all_of_them = least.seconds + once, most.seconds + once
        usual = math.sqrt(fewest * all_of_them)
        return Estimate(usual, most.flops, int(peak_bytes), fewest, all_of_them)

    def _fewest(self, stage: Stage) -> int:
        """The epochs after which a stage's candidates stop at the earliest, or a refinement usually does."""
        if stage.name == "refine":
            return min(stage.epochs, REFINED)
        if stage.name != "final" or self.protocol.one_pass or self.protocol.patience is None:
            return stage.epochs
        return min(stage.epochs, max(self.protocol.min_epochs, self.protocol.patience + 1))

    def _peak(self, step: _Fitted | None, read: _Fitted, judge: _Fitted, blocks: float) -> float:
        """Bytes of the heaviest pass, with the frozen outputs of all layers that have candidates."""
        train, selection = self.train.largest, self.selection.largest
        heaviest = max(
            (step or read).bytes(train, blocks if step else 1) + self._frozen_bytes(train.tokens),
            judge.bytes(selection, 1) + self._frozen_bytes(selection.tokens),
        )
        kept = 0.0
        if self.protocol.one_pass:  # of both splits, where they fit
            drawn = self.stages[0].train / self.protocol.seeds
            kept = self._frozen_bytes(
                self.selection.mean.tokens * self.judged + self.train.mean.tokens * drawn
            )
        own = sum(each.nbytes for each in self.probe(self.sites[0]).intervention.tensors.values())
        return heaviest + min(KEPT_BYTES, kept) + COPIES * own * max(each.candidates for each in self.stages)


def _batch(engine: UpperBlocks, documents: Sequence[TokenizedDocument]) -> Batch:
    """The first pass over the documents, which are those of one pass."""
    return next(iter(engine.batches(documents)))


def _seconds(work: Callable[[], object]) -> float:
    """How long something takes; where that is short, the mean of several times."""
    times, started = 0, clock()
    while True:
        work()
        times += 1
        spent = clock() - started
        if spent >= STEADY or times == 10:
            return spent / times


def _weights(backbone: Backbone) -> list[float]:
    """The blocks' shares of the work, going by their parameters; the mean is 1."""
    sizes = [sum(each.numel() for each in block.parameters()) or 1 for block in backbone.blocks]
    return [size * len(sizes) / sum(sizes) for size in sizes]
