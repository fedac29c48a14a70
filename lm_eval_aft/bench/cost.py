"""What a study will cost, on paper: the real code run on a model without numbers.

Training and scoring passes are made on the meta device, where operations have shapes and no values, over a
document of assumed length. Blocks are alike, so two shallow copies of the model tell what a block costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lm_eval_aft.backbone import find_backbone
from lm_eval_aft.bench.matrix import Cell
from lm_eval_aft.bench.shapes import SIZES, UNKNOWN_SIZES, Shape, lengths_known, mean_and_longest
from lm_eval_aft.intervention import Intervention
from lm_eval_aft.methods import find_method
from lm_eval_aft.packing import Batch, Document, continuation_logits, option_logprobs, token_logprobs
from lm_eval_aft.training.blank import may_pack_blank
from lm_eval_aft.training.estimate import PeakMemory
from lm_eval_aft.training.fit import Candidate, Recipe
from lm_eval_aft.training.objectives import make_objective
from lm_eval_aft.training.protocols import parse_layers, schedule
from lm_eval_aft.training.trajectory import DEFAULT_TOKEN_BUDGET, Trajectory, master_dtype

SHALLOW, DEEPER = 2, 4


@dataclass(frozen=True)
class Cost:
    """What a cell costs.

    Attributes:
        candidates: candidates trained, over all stages.
        steps: optimiser steps of all candidates together.
        train_flops, score_flops: floating-point operations in matrix products and attention; the
            baseline's scoring is not counted here.
        peak_bytes: memory above the weights, at the longest documents.
    """

    candidates: int
    steps: int
    train_flops: float
    score_flops: float
    peak_bytes: int


@dataclass(frozen=True)
class Passes:
    """Operations and bytes of single passes, each as a constant and a part for every block."""

    forward: tuple[float, float]
    trained: tuple[float, float]
    peak: tuple[float, float]

    def at(self, part: str, blocks: float) -> float:
        """The cost of a pass through so many blocks."""
        constant, each = getattr(self, part)
        return float(constant + each * blocks)


class Paper:
    """Costs of one model's cells."""

    def __init__(self, shape: Shape, budget: int = DEFAULT_TOKEN_BUDGET) -> None:
        self.shape, self.budget = shape, budget
        model = shape.model()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.weights = sum(p.numel() * p.element_size() for p in model.parameters())
        backbone = find_backbone(model)
        self.hidden_size, self.depth = backbone.hidden_size, len(backbone.blocks)
        self._passes: dict[Any, Passes] = {}

    def cost(self, cell: Cell, shots: int) -> Cost:
        """One cell's."""
        plan, depth = cell.plan, self.depth
        available, _ = SIZES.get(cell.task.task, UNKNOWN_SIZES)
        passes = self.passes(cell.task.task, shots, plan.method, plan.protocol.batch_size)
        method = find_method(plan.method)
        layers = parse_layers(plan.protocol.layers, depth)
        sites = layers[:1] if method.together else layers
        selection = plan.selection_docs or min(plan.protocol.selection_docs, available // 2)
        train = plan.train_docs or min(plan.protocol.train_docs, available - selection)
        # A stage's survivors are not known beforehand: the mean layer stands for all.
        tail = sum(depth - 1 - layer for layer in sites) / len(sites)
        frozen = passes.at("forward", depth)
        candidates = steps = 0
        flops = 0.0
        for stage in schedule(plan.protocol, len(sites), train, selection):
            candidates += stage.candidates
            # Candidates of one seed see the same documents and share one frozen pass.
            group = stage.candidates / (plan.protocol.seeds if stage.name == "final" else 1)
            own = passes.at("trained", tail) + frozen / group if method.trained else frozen
            judged = passes.at("forward", tail) + frozen / stage.candidates
            flops += stage.candidates * stage.epochs * (stage.train * own + stage.selection * judged)
            if method.trained:
                steps += stage.candidates * stage.epochs * -(-stage.train // plan.protocol.batch_size)
        scored = (1 + cell.placebos) * self.baseline_flops(cell, shots)
        return Cost(candidates, steps, flops, scored, int(passes.at("peak", depth)))

    @staticmethod
    def assumed(cell: Cell) -> bool:
        """Whether the lengths of its task's documents are only guessed."""
        return not lengths_known(cell.task.task)

    def baseline_flops(self, cell: Cell, shots: int) -> float:
        """Scoring a cell's baseline, or its vector."""
        _, available = SIZES.get(cell.task.task, UNKNOWN_SIZES)
        passes = self.passes(cell.task.task, shots, cell.plan.method, cell.plan.protocol.batch_size)
        return min(cell.task.limit or available, available) * passes.at("forward", self.depth)

    def passes(self, task: str, shots: int, method: str, batch_size: int) -> Passes:
        """Measured on two shallow copies of the model."""
        key = (task, shots, method, batch_size)
        if key not in self._passes:
            documents = mean_and_longest(task, shots)
            counts = {d: self._measure(d, documents, method, batch_size) for d in (SHALLOW, DEEPER)}
            parts = []
            for i, blocks in enumerate(((SHALLOW, DEEPER), (SHALLOW - 1, DEEPER - 1), (SHALLOW, DEEPER))):
                low, high = counts[SHALLOW][i], counts[DEEPER][i]
                each = (high - low) / (blocks[1] - blocks[0])
                parts.append((low - each * blocks[0], each))
            self._passes[key] = Passes(*parts)
        return self._passes[key]

    def _measure(
        self, depth: int, documents: tuple[Document, Document], method: str, batch_size: int
    ) -> tuple[float, float, float]:
        """Operations of a frozen pass, of a training pass from the first block on, and peak memory."""
        model = self.shape.model(depth)
        mean, long = documents
        packed = may_pack_blank(model, documents)
        objective = make_objective("choice", "acc", ["acc"])  # what it makes of log-likelihoods costs nothing
        engine = Trajectory(model, find_backbone(model), objective, packed=packed, budget=self.budget)
        with counted() as flops:
            batch = _batch(engine, [mean])
            with torch.no_grad():
                continuation_logits(model, batch)
            forward = flops()
            outputs = engine.outputs(batch, [0])
            before = flops()
            self._train(engine, self._candidate(method), batch, outputs)
            trained = flops() - before
        peaks = []
        together = max(1, self.budget // (long.tokens(packed) * long.rows(packed)))
        for count, train in ((min(batch_size, together), True), (together, False)):
            with counted(), PeakMemory("meta") as memory:
                batch = _batch(engine, [long] * count)
                outputs = engine.outputs(batch, range(depth))
                if train:
                    self._train(engine, self._candidate(method), batch, outputs)
                else:
                    with torch.no_grad():
                        option_logprobs(continuation_logits(model, batch), batch)
                peaks.append(memory.peak)
        return forward, trained, max(peaks)

    def _candidate(self, method: str) -> Candidate:
        found = find_method(method)
        tensors = found.start(self.hidden_size, (0,), torch.Generator().manual_seed(0))
        dtype = master_dtype(self.shape.dtype)
        placed = {name: tensor.to("meta", dtype) for name, tensor in tensors.items()}
        return Candidate(0, 0, Recipe(), Intervention(found, placed))

    def _train(self, engine: Trajectory, candidate: Candidate, batch: Batch, outputs: dict[int, Any]) -> None:
        if not candidate.trained:
            return
        with engine._steered(candidate, outputs):
            logits = continuation_logits(engine.model, batch)
        candidate.backward(token_logprobs(logits, batch).sum())


def _batch(engine: Trajectory, documents: list[Document]) -> Batch:
    """The first batch of documents, with a mask in any case: without one, values would be looked at."""
    batch = next(engine.batches(documents))
    ids = batch.inputs["input_ids"]
    if "attention_mask" not in batch.inputs:
        mask = ids.new_zeros(1, dtype=next(engine.model.parameters()).dtype)
        batch.inputs["attention_mask"] = mask.expand(ids.shape[0], 1, ids.shape[1], ids.shape[1])
        batch.inputs["position_ids"] = torch.zeros_like(ids)
    return batch


@contextmanager
def counted() -> Iterator[Any]:
    """Count operations in the block; attention without its table of scores, as fused kernels work."""
    with _FusedAttention() as attention, FlopCounterMode(display=False) as counter:
        yield lambda: counter.get_total_flops() + attention.flops


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps what a fused kernel keeps, and counts as the flop counter counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, key, value = (named[name] for name in ("query", "key", "value"))
        return _Attention.apply(self, query, key, value)  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """Shapes of attention; two products forward and, as fused kernels recompute one, five backward."""

    @staticmethod
    def forward(ctx: Any, mode: _FusedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.mode = mode
        ctx.save_for_backward(query, key, value)
        mode.flops += _product(query, key) + _product(query, value)
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors
        ctx.mode.flops += 3 * _product(query, key) + 2 * _product(query, value)
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _product(query: Tensor, other: Tensor) -> int:
    rows, heads, length, _ = query.shape
    return int(2 * rows * heads * length * other.shape[-2] * other.shape[-1])
