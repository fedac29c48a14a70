"""The engines that train candidates: the fast one, which shares frozen passes, and the plain reference."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import (
    Batch,
    TokenizedDocument,
    capture,
    continuation_logits,
    make_batch,
    option_logprobs,
    resumed,
    token_budget_batches,
    units,
)
from lm_eval_aft.engine.checks import packing_problem
from lm_eval_aft.engine.precision import subnormals_flushed
from lm_eval_aft.steering.backbone import Backbone, attention_kernel, input_device
from lm_eval_aft.steering.hooks import add_all, hidden_states
from lm_eval_aft.steering.intervention import Intervention, roles, row_roles
from lm_eval_aft.training.candidate import Candidate, Engine, Recipe, Tick
from lm_eval_aft.training.objectives import Objective
from lm_eval_aft.training.selection import Score

logger = logging.getLogger(__name__)
# Tokens in one pass. A few hundred keep a CPU busy already, and more padding costs time.
TOKEN_BUDGET = {"cpu": 1024}
DEFAULT_TOKEN_BUDGET = 16384


class Trajectory:
    """Engine that shares the frozen part of every pass among candidates.

    Below a candidate's layer nothing depends on its vector, so one frozen pass per batch gives
    the output of every block, and a candidate at layer L runs blocks L+1 and up only, forward
    and backward. The options of a document share their context in one packed row where the
    model allows it, and the head is applied to continuation positions only.

    Args:
        packed: whether to pack rows; see `lm_eval_aft.engine.checks.packing_problem`.
        budget: most tokens (rows x width) in one pass; by default what suits the device.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        objective: Objective,
        *,
        packed: bool,
        budget: int | None = None,
    ) -> None:
        self.model = model.requires_grad_(False)
        self.backbone = backbone
        self.objective = objective
        self.packed = packed
        device = input_device(model).type
        self.budget = budget or TOKEN_BUDGET.get(device, DEFAULT_TOKEN_BUDGET)
        # Frozen blocks' outputs by documents and layer, of the latest passes: at most so many bytes of them.
        # Every frozen pass keeps those at these layers, whatever it was made for.
        self.keep_bytes = 0
        self.keep_layers: Collection[int] = ()
        self._kept_outputs: dict[tuple[tuple[TokenizedDocument, ...], int], Any] = {}

    @subnormals_flushed()
    def train(
        self, candidates: Sequence[Candidate], steps: Sequence[Sequence[TokenizedDocument]], tick: Tick
    ) -> None:
        for step in steps:
            live = [candidate for candidate in candidates if not candidate.stopped]

            def gather(batch: Batch, live: list[Candidate] = live, size: int = len(step)) -> None:
                outputs = self.outputs(batch, {candidate.layer for candidate in live})
                for candidate in live:
                    with self.steered(candidate, outputs):
                        logits = continuation_logits(self.model, batch)
                    candidate.backward(self.objective.losses(logits, batch).sum() / size)

            def forget(live: list[Candidate] = live) -> None:
                for candidate in live:
                    candidate.forget()

            self.each_batch(step, gather, forget)
            tick(len(live) * len(step))
            for candidate in live:
                candidate.step()

    def evaluate(
        self, candidates: Sequence[Candidate], documents: Sequence[TokenizedDocument], tick: Tick
    ) -> list[Score]:
        return [self.objective.summarise(each) for each in self.outcomes(candidates, documents, tick)]

    @subnormals_flushed()
    @torch.no_grad()
    def outcomes(
        self, candidates: Sequence[Candidate], documents: Sequence[TokenizedDocument], tick: Tick
    ) -> list[list[NDArray[np.float64]]]:
        outcomes: list[list[NDArray[np.float64]]] = [[] for _ in candidates]

        def score(batch: Batch) -> None:
            outputs = self.outputs(batch, {candidate.layer for candidate in candidates})
            for candidate, its_outcomes in zip(candidates, outcomes, strict=True):
                with self.steered(candidate, outputs):
                    logits = continuation_logits(self.model, batch)
                its_outcomes += self.objective.outcomes(logits, batch)
            tick(len(candidates) * len(batch.documents))

        def forget() -> None:
            for its_outcomes in outcomes:
                its_outcomes.clear()

        self.each_batch(by_length(documents, self.packed), score, forget)
        return outcomes

    @torch.no_grad()
    def baseline(self, documents: Sequence[TokenizedDocument], tick: Tick) -> Score:
        outcomes: list[NDArray[np.float64]] = []

        def score(batch: Batch) -> None:
            outcomes.extend(self.objective.outcomes(continuation_logits(self.model, batch), batch))
            tick(len(batch.documents))

        self.each_batch(by_length(documents, self.packed), score, outcomes.clear)
        return self.objective.summarise(outcomes)

    def batches(self, documents: Sequence[TokenizedDocument]) -> Iterator[Batch]:
        """Cut documents, in the order given, into batches within the token budget."""
        parameter = next(self.model.parameters())
        for indices in token_budget_batches(documents, self.packed, self.budget):
            chosen = [documents[i] for i in indices]
            yield make_batch(chosen, self.packed, input_device(self.model), parameter.dtype)

    @torch.no_grad()
    def outputs(self, batch: Batch, layers: Collection[int]) -> dict[int, Any]:
        """The frozen model's output at each of these blocks."""
        kept = {layer: self._kept_outputs.get((batch.documents, layer)) for layer in layers}
        if kept and all(output is not None for output in kept.values()):
            return kept
        with capture(self.backbone, sorted({*layers, *self.keep_layers})) as outputs:
            _run_blocks(self.model, batch)
        self.keep(batch, outputs)
        return outputs

    def keep(self, batch: Batch, outputs: Mapping[int, Any]) -> None:
        """Let frozen blocks' outputs serve later passes over the same documents, if they may be kept."""
        if not self.keep_bytes:
            return
        self._kept_outputs |= {(batch.documents, layer): output for layer, output in outputs.items()}
        sizes = {key: hidden_states(output).nbytes for key, output in self._kept_outputs.items()}
        total = sum(sizes.values())
        for key, size in sizes.items():  # the oldest first
            if total <= self.keep_bytes:
                break
            del self._kept_outputs[key]
            total -= size

    def keep_only(self, layers: Collection[int]) -> None:
        """From now on keep the outputs of these layers, and drop those of all others."""
        self.keep_layers = layers
        for key in [key for key in self._kept_outputs if key[1] not in layers]:
            del self._kept_outputs[key]

    @contextmanager
    def steered(self, candidate: Candidate, outputs: dict[int, Any]) -> Iterator[None]:
        """Passes start at the candidate's layer, from the frozen model's output there."""
        layer = candidate.layer
        with (
            add_all(self.backbone, candidate.intervention.shifts()),
            resumed(self.backbone, layer, outputs[layer]),
        ):
            yield

    def each_batch(
        self,
        documents: Sequence[TokenizedDocument],
        work: Callable[[Batch], None],
        forget: Callable[[], None],
    ) -> None:
        """Do ``work`` batch by batch; out of memory, ``forget`` it all and start again with smaller ones.

        Raises:
            AFTError: not even one document fits.
        """
        while True:
            # What is reported where even making the batch fails.
            batch: Batch | None = None
            size, tokens = len(documents), self.budget
            try:
                for batch in self.batches(documents):
                    size, tokens = len(batch.documents), batch.inputs["input_ids"].numel()
                    work(batch)
                    batch, size, tokens = None, len(documents), self.budget
                return
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if size == 1 or self.budget == 1:
                    raise AFTError(
                        "Out of memory on a single document.",
                        "Use a smaller --num-fewshot, --dtype bfloat16, or a device with more memory.",
                    ) from error
            # Outside the handler, so that the failed pass's tensors are free by now.
            del batch
            forget()
            self._kept_outputs.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.budget = max(1, min(self.budget, tokens) // 2)
            logger.warning("Out of memory: going on with at most %d tokens a pass.", self.budget)


def make_engine(
    model: nn.Module, backbone: Backbone, objective: Objective, documents: Sequence[TokenizedDocument]
) -> tuple[Engine, str]:
    """The fastest engine that agrees with the plain one on these documents, and its name.

    Tries packed rows, then unpacked rows resumed from a layer, then the plain engine.

    Raises:
        AFTError: the model's attention has no gradients on its device.
    """
    if attention_kernel(model) == "flex_attention" and input_device(model).type == "cpu":
        raise AFTError(
            "flex attention has no gradients on a CPU.", "Load the model with attn_implementation=sdpa."
        )
    reason = packing_problem(model, documents)
    if reason:
        logger.info("Rows are not packed: %s.", reason)
    engine = Trajectory(model, backbone, objective, packed=not reason)
    reference = Reference(model, backbone, objective)
    reason = _resuming_differs(engine, reference, min(documents, key=lambda d: d.tokens(False)))
    if reason:
        logger.warning("The plain engine is used, which is slow: %s.", reason)
        return reference, "reference"
    return engine, "packed" if engine.packed else "unpacked"


@torch.no_grad()
def _resuming_differs(engine: Trajectory, reference: Reference, document: TokenizedDocument) -> str:
    """Compare both engines on one document under a vector as long as a typical hidden state."""
    layer = (len(engine.backbone.blocks) - 1) // 2
    parameter, device = next(engine.model.parameters()), input_device(engine.model)
    batch = make_batch([document], engine.packed, device, parameter.dtype)
    outputs = engine.outputs(batch, [layer])
    size = float(hidden_states(outputs[layer])[0].float().norm(dim=-1).median())
    size /= engine.backbone.hidden_size**0.5
    vector = torch.linspace(-1, 1, engine.backbone.hidden_size, device=device) * 0.1 * size
    probe = Candidate(
        layer, 0, Recipe(), Intervention.static(layer, vector.to(master_dtype(parameter.dtype)))
    )
    try:
        with engine.steered(probe, outputs):
            fast = option_logprobs(continuation_logits(engine.model, batch), batch)
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        return f"this model cannot be resumed from a block ({error})"
    slow = option_logprobs(*reference.logits(document, probe))
    bar = 1e-4 if parameter.dtype in (torch.float32, torch.float64) else 0.1 * float(len(batch.targets))
    worst = float((fast - slow).abs().max())
    fine = worst <= max(bar, 1e-6 * float(slow.abs().max()))
    return "" if fine else f"resumed passes differ by {worst:.2g} nats"


MEASURED = 64  # documents whose hidden states are measured


@torch.no_grad()
def residual_norms(
    model: nn.Module, backbone: Backbone, layers: Sequence[int], documents: Sequence[TokenizedDocument]
) -> dict[int, float]:
    """Median norm of the hidden states at each layer's output, over the tokens of the first documents.

    A multiple-choice document is read with its first option. Four digits are kept, so that a resumed run
    measures the same.
    """
    parameter = next(model.parameters())
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for document in documents[:MEASURED]:
        batch = make_batch(
            [TokenizedDocument(document.pairs[:1])], False, input_device(model), parameter.dtype
        )
        with capture(backbone, list(layers)) as outputs:
            _run_blocks(model, batch)
        for layer, norms in found.items():
            norms.append(hidden_states(outputs[layer])[0].float().norm(dim=-1).cpu())
    return {layer: float(f"{float(torch.cat(norms).median()):.4g}") for layer, norms in found.items()}


def require_norms(norms: Mapping[int, float], advice: str) -> None:
    """Raise an `AFTError` where a length or rate cannot be relative to a layer's median norm."""
    for layer, norm in norms.items():
        if not 0 < norm < math.inf:
            raise AFTError(
                f"The hidden states have a median norm of {norm:g} at layer {layer}, so nothing can be "
                "relative to it.",
                advice,
            )


def _run_blocks(model: nn.Module, batch: Batch) -> None:
    """A pass for hooks on the blocks: the head is applied to one position only."""
    continuation_logits(model, replace(batch, scored=batch.scored[:1]))


def _out_of_memory(error: RuntimeError) -> bool:
    # CUDA raises a class of its own; the CPU allocator only a message.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that candidates of a model of this dtype are trained in."""
    return torch.promote_types(dtype, torch.float32)


def by_length(documents: Sequence[TokenizedDocument], packed: bool) -> list[TokenizedDocument]:
    """Longest first; documents of a group stay together."""
    together = [[documents[i] for i in unit] for unit in units(documents)]
    together.sort(key=lambda unit: -max(document.tokens(packed) for document in unit))
    return [document for unit in together for document in unit]


# The plain engine: one candidate, one option, one whole pass of the hooked model at a time.
#
# Slow and simple: the fast engine is tested against it, and falls back to it.


class Reference:
    """Engine without any shortcut."""

    def __init__(self, model: nn.Module, backbone: Backbone, objective: Objective) -> None:
        self.model = model.requires_grad_(False)
        self.backbone = backbone
        self.objective = objective

    def train(
        self, candidates: Sequence[Candidate], steps: Sequence[Sequence[TokenizedDocument]], tick: Tick
    ) -> None:
        for candidate in candidates:
            for step in steps:
                if candidate.stopped:
                    break
                for document in step:
                    logits, batch = self.logits(document, candidate)
                    candidate.backward(self.objective.losses(logits, batch).sum() / len(step))
                    tick(1)
                candidate.step()

    def evaluate(
        self, candidates: Sequence[Candidate], documents: Sequence[TokenizedDocument], tick: Tick
    ) -> list[Score]:
        return [self.objective.summarise(each) for each in self.outcomes(candidates, documents, tick)]

    def baseline(self, documents: Sequence[TokenizedDocument], tick: Tick) -> Score:
        return self.objective.summarise(self._outcomes(None, documents, tick))

    def outcomes(
        self, candidates: Sequence[Candidate], documents: Sequence[TokenizedDocument], tick: Tick
    ) -> list[list[NDArray[np.float64]]]:
        return [self._outcomes(candidate, documents, tick) for candidate in candidates]

    @torch.no_grad()
    def _outcomes(
        self, candidate: Candidate | None, documents: Sequence[TokenizedDocument], tick: Tick
    ) -> list[NDArray[np.float64]]:
        outcomes: list[NDArray[np.float64]] = []
        for document in documents:
            logits, batch = self.logits(document, candidate)
            outcomes += self.objective.outcomes(logits, batch)
            tick(1)
        return outcomes

    def logits(self, document: TokenizedDocument, candidate: Candidate | None) -> tuple[Tensor, Batch]:
        """Logits (S, vocabulary) at a document's scored positions, and the batch that describes them."""
        device = input_device(self.model)
        rows = []
        shifts = {} if candidate is None else candidate.intervention.shifts()
        for context, continuation in document.pairs:
            ids = torch.tensor([(*context, *continuation[:-1])], device=device)
            kinds = torch.tensor([row_roles(len(context), len(continuation) - 1)], device=device)
            with add_all(self.backbone, shifts), roles(kinds):
                logits = self.model(input_ids=ids, use_cache=False).logits[0]
            rows.append(logits[len(context) - 1 :])
        # The batch only tells the objective which row belongs to which option.
        return torch.cat(rows), make_batch([document], False, device, torch.float32)
