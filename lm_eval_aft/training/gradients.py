"""One backward pass over the training documents: gradients for a vector at every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import (
    Batch,
    TokenizedDocument,
    continuation_logits,
    lay_out,
    token_budget_batches,
    units,
)
from lm_eval_aft.engine.precision import subnormals_flushed
from lm_eval_aft.steering.backbone import Backbone
from lm_eval_aft.steering.hooks import hidden_states, with_hidden_states
from lm_eval_aft.steering.intervention import mask_for
from lm_eval_aft.training.candidate import Tick, Workers
from lm_eval_aft.training.trainer import Reference, Trajectory, by_length, master_dtype

# The gradient with respect to a vector added at a block's output is the gradient with respect to that output,
# summed over the tokens that are steered: one backward pass gives it for all blocks and all positions.

PARTS = 512  # the most parts of the training documents whose gradients are told apart


class Gradients:
    """Gradients of the training loss at v = 0 for a vector at each block, by parts of the documents.

    A part is a document, the documents that share a row, or, where there are more than `PARTS` of those,
    several of them: memory is parts x layers x hidden_size numbers for each of ``positions``, and in the pass
    the activations of one batch.

    Attributes:
        layers: the blocks.
        sums: by positions, (parts, layers, hidden_size): gradient of the sum of the part's losses with
            respect to a vector added to those tokens; float32 or better, on the CPU.
        counts: (parts,) documents in each.
    """

    def __init__(
        self,
        engine: Trajectory | Reference,
        documents: Sequence[TokenizedDocument],
        layers: Sequence[int],
        positions: Sequence[str],
        name: str = "pass",
        workers: Workers | None = None,
    ) -> None:
        if not isinstance(engine, Trajectory | Reference):
            raise TypeError(f"No gradients from {type(engine).__name__}.")
        self.engine, self.layers, self.name = engine, sorted(layers), name
        self._workers = workers or Workers()
        chunks = [[document] for document in documents]
        if isinstance(engine, Trajectory):  # the batches that later passes over these documents have
            ordered = by_length(documents, engine.packed)
            cut = token_budget_batches(ordered, engine.packed, engine.budget)
            chunks = [[ordered[i] for i in indices] for indices in cut]
        self._chunks = chunks[self._workers.rank :: self._workers.size]
        groups = units(documents)
        parts = min(PARTS, len(groups))
        self._part = {
            id(documents[i]): g * parts // len(groups) for g, unit in enumerate(groups) for i in unit
        }
        parameter = next(engine.model.parameters())
        shape = (parts, len(self.layers), engine.backbone.hidden_size)
        self.sums = {each: torch.zeros(shape, dtype=master_dtype(parameter.dtype)) for each in positions}
        self.counts = torch.zeros(parts)
        self.done = 0  # chunks
        self.finished = False

    @subnormals_flushed()
    def run(self, tick: Tick, pause: Callable[[], None] = lambda: None) -> Gradients:
        """Read what documents are left; ``pause`` is called where the pass can be saved."""
        if self.finished:
            return self
        for chunk in self._chunks[self.done :]:
            for parts, each in self._read(chunk):
                index = torch.tensor(parts)
                for positions, gradient in each.items():
                    self.sums[positions].index_add_(0, index, gradient.to(self.sums[positions]))
            for document in chunk:
                self.counts[self._part[id(document)]] += 1
            self.done += 1
            tick(len(chunk))
            if self._workers.size == 1:
                pause()
        others = self._workers.gather((self.sums, self.counts))
        self.sums = {each: torch.stack([sums[each] for sums, _ in others]).sum(0) for each in self.sums}
        self.counts = torch.stack([counts for _, counts in others]).sum(0)
        self.finished = True
        return self

    def mean(self, positions: str, parts: slice = slice(None)) -> Tensor:
        """Gradient of the mean loss (layers, hidden_size) over all documents, or over some parts."""
        return self.sums[positions][parts].sum(0) / self.counts[parts].sum().clamp(min=1)

    def halves(self, positions: str) -> tuple[Tensor, Tensor]:
        """The same over every other part, and over the rest; of a single part, that and zeros."""
        return self.mean(positions, slice(0, None, 2)), self.mean(positions, slice(1, None, 2))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values from which `restore` goes on."""
        tensors = {f"sums:{each}": table for each, table in self.sums.items()}
        values = {"done": self.done, "finished": self.finished, "stopped": "", "steps": 0}
        return tensors | {"counts": self.counts}, values

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up a state written by `state`.

        Only a process that is alone writes unfinished ones; several divide the documents in another way and
        start the pass again.
        """
        if not values["finished"] and self._workers.size > 1:
            return
        self.sums = {each: tensors[f"sums:{each}"] for each in self.sums}
        self.counts = tensors["counts"]
        self.done, self.finished = values["done"], values["finished"]

    def _read(self, chunk: Sequence[TokenizedDocument]) -> list[tuple[list[int], dict[str, Tensor]]]:
        """The chunk's passes: the part that each row belongs to, and the rows' gradients."""
        if isinstance(self.engine, Reference):
            return [each for document in chunk for each in self._plain(document)]
        found: list[tuple[list[int], dict[str, Tensor]]] = []
        self.engine.each_batch(chunk, lambda batch: found.append(self._packed(batch)), found.clear)
        return found

    def _packed(self, batch: Batch) -> tuple[list[int], dict[str, Tensor]]:
        engine: Any = self.engine
        with _watched(engine.backbone, self.layers, list(self.sums)) as passes:
            losses = engine.objective.losses(continuation_logits(engine.model, batch), batch)
        losses.sum().backward()
        documents = batch.documents
        together = units(documents) if engine.packed else [[i] for i in range(len(documents))]
        parts = []
        for unit in together:
            rows = lay_out([documents[i] for i in unit], engine.packed)
            parts += [self._part[id(documents[unit[0]])]] * len(rows)
        engine.keep(batch, {k: v for k, v in passes[0].outputs.items() if k in engine.keep_layers})
        return parts, passes[0].gradients()

    def _plain(self, document: TokenizedDocument) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """One document, each option in a pass of its own."""
        engine: Any = self.engine
        with _watched(engine.backbone, self.layers, list(self.sums)) as passes:
            losses = engine.objective.losses(*engine.logits(document, None))
        losses.sum().backward()
        part = self._part[id(document)]
        for each in passes:
            yield [part], each.gradients()


@dataclass
class _Pass:
    """One forward pass: every block's output, and which of its tokens each choice of positions steers."""

    masks: dict[str, Tensor | None]
    streams: list[Tensor] = field(default_factory=list)
    outputs: dict[int, Any] = field(default_factory=dict)  # of the blocks, without their gradients

    def gradients(self) -> dict[str, Tensor]:
        """After the backward pass: (rows, layers, hidden_size) by positions, summed over tokens."""
        found: dict[str, list[Tensor]] = {each: [] for each in self.masks}
        for hidden in self.streams:
            if hidden.grad is None:
                raise AFTError("The loss does not depend on a block's output.", "Choose other --layers.")
            wide = hidden.grad.to(master_dtype(hidden.dtype))
            for positions, mask in self.masks.items():
                summed = wide.sum(1) if mask is None else (wide * mask.to(wide.device)).sum(1)
                found[positions].append(summed.cpu())
        return {each: torch.stack(rows, 1) for each, rows in found.items()}


@contextmanager
def _watched(backbone: Backbone, layers: Sequence[int], positions: Sequence[str]) -> Iterator[list[_Pass]]:
    """Collect the passes made inside the block, with gradients at these blocks' outputs."""
    passes: list[_Pass] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any, *, layer: int) -> Any:
        hidden = hidden_states(output)
        if layer == layers[0]:
            passes.append(_Pass({each: mask_for(each, hidden) for each in positions}))
        if not hidden.requires_grad:  # the first of them: nothing before it is trained
            hidden = hidden.detach().requires_grad_(True)
        hidden.retain_grad()
        passes[-1].streams.append(hidden)
        passes[-1].outputs[layer] = with_hidden_states(output, hidden.detach())
        return with_hidden_states(output, hidden)

    handles = [backbone.blocks[layer].register_forward_hook(partial(hook, layer=layer)) for layer in layers]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
