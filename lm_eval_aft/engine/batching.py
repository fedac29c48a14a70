"""Batches of documents for training, log-likelihoods from one pass, and passes that start at block L.

A *packed* row holds a context once, followed by every continuation; a tree mask lets each
continuation see the context and itself only, and its position ids start again after the context.
Documents whose contexts begin alike may share a row too: the common prefix once, then each one's branch.
An *unpacked* row is one context with one continuation, padded on the right, as lm-eval's `hf` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft.engine.attention import Parts, in_parts
from lm_eval_aft.engine.rows import (
    SHORTEST_PREFIX,
    PackedRow,
    Tokens,
    common_prefix,
    packed_row,
    step_over,
    within_budget,
)
from lm_eval_aft.steering.backbone import Backbone
from lm_eval_aft.steering.hooks import hidden_states, with_hidden_states
from lm_eval_aft.steering.intervention import CONTEXT, roles

# A shared row may hold this many token budgets, since its documents would take many more by themselves,
# and this many tokens, since its mask grows with their square.
SHARED_BUDGETS, SHARED_TOKENS = 4, 4096


@dataclass(frozen=True)
class TokenizedDocument:
    """Token ids of one document: ``pairs`` of (context, continuation), one per option.

    Neither part is empty. ``gold`` holds the indices of the right options and ``lengths`` each
    option's length in characters (the unit lm-eval normalises by). ``task`` numbers the tasks of a mixture.
    Documents of one task and one ``group`` have prompts that begin alike (the same few-shot examples).
    """

    pairs: tuple[tuple[Tokens, Tokens], ...]
    gold: tuple[int, ...] = (0,)
    lengths: tuple[float, ...] = (1.0,)
    task: int = 0
    group: int | None = None

    def groups(self) -> dict[Tokens, list[int]]:
        """Option indices by context: usually one context shared by all options."""
        found: dict[Tokens, list[int]] = {}
        for index, (context, _) in enumerate(self.pairs):
            found.setdefault(context, []).append(index)
        return found

    def tokens(self, packed: bool) -> int:
        """Length of the longest row this document needs by itself, in tokens."""
        return max(row.width for row in lay_out([self], packed))

    def rows(self, packed: bool) -> int:
        """How many rows this document needs by itself."""
        return len(self.groups()) if packed else len(self.pairs)


def lay_out(documents: Sequence[TokenizedDocument], packed: bool) -> list[PackedRow]:
    """The rows that documents need, in order of their first document.

    Packed, a document's options with one context share a row, and so do documents of one group. A row
    that is not packed is one context with one continuation.
    """
    first, starts = 0, []
    for document in documents:
        starts.append(first)
        first += len(document.pairs)
    if not packed:
        return [
            packed_row(context, [((), [(start + i, tail)])])
            for start, document in zip(starts, documents, strict=True)
            for i, (context, tail) in enumerate(document.pairs)
        ]
    rows = []
    for unit in units(documents):
        contexts = [
            (context, [(starts[place] + i, documents[place].pairs[i][1]) for i in options])
            for place in unit
            for context, options in documents[place].groups().items()
        ]
        shared = common_prefix([context for context, _ in contexts]) if len(unit) > 1 else 0
        if shared >= SHORTEST_PREFIX:
            branches = [(context[shared:], tails) for context, tails in contexts]
            rows.append(packed_row(contexts[0][0][:shared], branches))
        else:
            rows += [packed_row(context, [((), tails)]) for context, tails in contexts]
    return rows


def units(documents: Sequence[TokenizedDocument]) -> list[list[int]]:
    """Indices of documents by group; a document without a group is a unit of its own."""
    found: dict[tuple[int, int | None, int], list[int]] = {}
    for index, document in enumerate(documents):
        alone = -1 if document.group is not None else index
        found.setdefault((document.task, document.group, alone), []).append(index)
    return list(found.values())


def token_budget_batches(
    documents: Sequence[TokenizedDocument], packed: bool, budget: int
) -> Iterator[tuple[int, ...]]:
    """Cut documents into batches, by index, so that rows x width stays within ``budget``.

    Documents keep their order, but for those of a group, which are brought together. A document that
    alone exceeds the budget gets a batch of its own, and a group whose row would be longer than
    `SHARED_BUDGETS` and `SHARED_TOKENS` allow is cut in pieces.
    """

    def size(piece: list[int]) -> tuple[int, int]:
        rows = lay_out([documents[i] for i in piece], packed)
        return len(rows), max(row.width for row in rows)

    for pieces in within_budget(_pieces(documents, packed, budget), size, budget):
        yield tuple(i for piece in pieces for i in piece)


def _pieces(documents: Sequence[TokenizedDocument], packed: bool, budget: int) -> Iterator[list[int]]:
    """Documents that share a row, as many as it may hold."""
    limit = min(SHARED_BUDGETS * budget, SHARED_TOKENS)
    for unit in units(documents) if packed else [[i] for i in range(len(documents))]:
        piece: list[int] = []
        for index in unit:
            longer = lay_out([documents[i] for i in [*piece, index]], packed)
            if piece and (len(longer) > 1 or longer[0].width > limit):
                yield piece
                piece = []
            piece.append(index)
        yield piece


@dataclass(frozen=True)
class Batch:
    """Tensors for one forward pass over several documents.

    Attributes:
        inputs: keyword arguments of the model: ``input_ids`` (rows, tokens), and for packed rows
            ``attention_mask`` (rows, 1, tokens, tokens; additive) and ``position_ids``.
        scored: (S,) flat positions in rows x tokens whose logits predict continuation tokens, each
            once: the last token of a shared context predicts the first token of every option.
        targets: (N,) the continuation tokens.
        source: (N,) which entry of ``scored`` predicts each of them.
        option: (N,) the option each belongs to, numbered through the batch.
        document: (options,) the document each option belongs to.
        documents: the documents themselves, in order.
        parts: how each packed row is divided, for attention; empty where rows are not packed.
        roles: (rows, tokens) what each token is; see `lm_eval_aft.steering.intervention`.
    """

    inputs: dict[str, Tensor]
    scored: Tensor
    targets: Tensor
    source: Tensor
    option: Tensor
    document: Tensor
    documents: tuple[TokenizedDocument, ...]
    parts: tuple[Parts, ...]
    roles: Tensor


def make_batch(
    documents: Sequence[TokenizedDocument], packed: bool, device: torch.device, dtype: torch.dtype
) -> Batch:
    """Documents as rows, padded on the right. ``dtype``: of the mask, as the model's."""
    rows = lay_out(documents, packed)
    step = step_over(rows, device, dtype if packed else None)
    owners = [d for d, document in enumerate(documents) for _ in document.pairs]

    def indices(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Batch(
        step.inputs,
        indices(step.scored),
        indices([target for option, _ in step.options for target in option.targets]),
        indices([place for _, places in step.options for place in places]),
        indices([option.index for option, _ in step.options for _ in option.targets]),
        indices(owners),
        tuple(documents),
        tuple(map(_parts, rows)) if packed else (),
        step.roles,
    )


def _parts(row: PackedRow) -> Parts:
    """How attention may divide a row: the prefix, and what follows it context by context."""
    starts = [run.start for run in row.runs[1:] if run.role == CONTEXT] or [row.prefix]
    return Parts(row.prefix, tuple(zip(starts, [*starts[1:], row.width], strict=True)))


def continuation_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (S, vocabulary) at the batch's scored positions; the head sees no other position."""
    with in_parts(batch.parts, batch.inputs["input_ids"].shape[1]), roles(batch.roles):
        return logits_at(model, {**batch.inputs, "use_cache": False}, batch.scored)


def logits_at(model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Logits (N, vocabulary) at flat ``positions`` (N,) in rows x tokens of one pass.

    The vocabulary head is applied there only, where the model has one that can be found.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def keep_scored(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        flat = hidden.reshape(-1, hidden.shape[-1])
        return (flat[positions.to(flat.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep_scored) if isinstance(head, nn.Module) else None
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    if logits.shape[:2] != (1, len(positions)) or handle is None:
        logits = logits.reshape(-1, logits.shape[-1])[positions.to(logits.device)]
    return logits.reshape(len(positions), logits.shape[-1])


def option_logprobs(logits: Tensor, batch: Batch) -> Tensor:
    """Summed log-likelihood (options,) in nats of every option, in fp32 or better."""
    tokens = token_logprobs(logits, batch)
    sums = torch.zeros(len(batch.document), dtype=tokens.dtype, device=tokens.device)
    return sums.index_add(0, batch.option.to(tokens.device), tokens)


def token_logprobs(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probability (N,) in nats of every continuation token, in fp32 or better."""
    found: Tensor = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, batch.source.to(logits.device), batch.targets.to(logits.device)
    )
    return found


_NOTHING = 1e-12  # relative to the largest gradient: far below what float32 can resolve


class _TokenLogprobs(torch.autograd.Function):
    """``log_softmax(logits)[source, targets]`` whose gradient reuses the one saved buffer.

    Autograd would fill and read two more tensors of S x vocabulary numbers, which for small
    models takes longer than their blocks.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, source: Tensor, targets: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(wide, source, targets)
        return wide[source, targets]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        table, source, targets = ctx.saved_tensors
        (gradient,) = gradients
        rows = torch.zeros(len(table), dtype=table.dtype, device=table.device)
        # Options that a softmax has all but ruled out weigh 1e-30 and less. Their gradients would be
        # subnormal numbers, which make products ten times as slow and change no sum.
        gradient = gradient.masked_fill(gradient.abs() < _NOTHING * gradient.abs().max(), 0.0)
        rows.index_add_(0, source, gradient)
        table.exp_().mul_(-rows.unsqueeze(1))
        table.index_put_((source, targets), gradient, accumulate=True)
        return table.to(ctx.dtype), None, None


@contextmanager
def capture(backbone: Backbone, layers: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Collect the outputs of the given blocks during the passes made inside the block."""
    outputs: dict[int, Any] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[layer] = with_hidden_states(output, hidden_states(output).detach())

        return hook

    handles = [backbone.blocks[layer].register_forward_hook(keep(layer)) for layer in set(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(backbone: Backbone, layer: int, output: Any) -> Iterator[None]:
    """Make passes start at block ``layer``: blocks below do nothing, and it returns ``output``.

    Everything around the blocks (masks, rotary tables, final norm, head, logit scaling) runs as
    the model defines it, so no family needs code of its own. Hooks on block ``layer`` still run.
    """
    saved = [block.__dict__.get("forward") for block in backbone.blocks[: layer + 1]]

    def passing(*args: Any, **kwargs: Any) -> Any:
        return with_hidden_states(output, args[0] if args else kwargs["hidden_states"])

    def answering(*_args: Any, **_kwargs: Any) -> Any:
        return output

    try:
        for block in backbone.blocks[:layer]:
            block.forward = passing
        backbone.blocks[layer].forward = answering
        yield
    finally:
        for block, forward in zip(backbone.blocks, saved, strict=False):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
