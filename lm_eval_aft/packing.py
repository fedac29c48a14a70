"""Rows of one context and many continuations, scored in one pass, and passes that start at block L.

A *packed* row holds a context once, followed by every continuation; a tree mask lets each
continuation see the context and itself only, and its position ids start again after the context.
An *unpacked* row is one context with one continuation, padded on the right, as lm-eval's `hf` does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft.attention import causal_prefix
from lm_eval_aft.backbone import Backbone
from lm_eval_aft.positions import PADDING, roles, row_roles
from lm_eval_aft.steering import hidden_states, with_hidden_states

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """Token ids of one document: ``pairs`` of (context, continuation), one per option.

    Neither part is empty. ``gold`` holds the indices of the right options and ``lengths`` each
    option's length in characters (the unit lm-eval normalises by). ``task`` numbers the tasks of a mixture.
    """

    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    gold: tuple[int, ...] = (0,)
    lengths: tuple[float, ...] = (1.0,)
    task: int = 0

    def groups(self) -> dict[tuple[int, ...], list[int]]:
        """Option indices by context: usually one context shared by all options."""
        found: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(self.pairs):
            found.setdefault(context, []).append(index)
        return found

    def tokens(self, packed: bool) -> int:
        """Length of the longest row this document needs, in tokens."""
        if not packed:
            return max(len(context) + len(continuation) - 1 for context, continuation in self.pairs)
        return max(
            len(context) + sum(len(self.pairs[i][1]) - 1 for i in options)
            for context, options in self.groups().items()
        )

    def rows(self, packed: bool) -> int:
        """How many rows this document needs."""
        return len(self.groups()) if packed else len(self.pairs)


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
        causal: tokens at the start of every row that its mask treats causally; 0 without a mask.
        roles: (rows, tokens) what each token is; see `lm_eval_aft.positions`.
    """

    inputs: dict[str, Tensor]
    scored: Tensor
    targets: Tensor
    source: Tensor
    option: Tensor
    document: Tensor
    documents: tuple[Document, ...]
    causal: int
    roles: Tensor


def make_batch(
    documents: Sequence[Document], packed: bool, device: torch.device, dtype: torch.dtype
) -> Batch:
    """Lay documents out in rows, padded on the right. ``dtype`` is the mask's, the model's own."""
    starts = [0]
    for document in documents:
        starts.append(starts[-1] + len(document.pairs))
    rows: list[tuple[tuple[int, ...], list[tuple[int, tuple[int, ...]]]]] = []
    for start, document in zip(starts, documents, strict=False):
        if packed:
            for context, options in document.groups().items():
                rows.append((context, [(start + i, document.pairs[i][1]) for i in options]))
        else:
            rows += [(context, [(start + i, tail)]) for i, (context, tail) in enumerate(document.pairs)]
    width = max(len(context) + sum(len(tail) - 1 for _, tail in tails) for context, tails in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    kinds = torch.full((len(rows), width), PADDING)
    # Padding sees itself, so that no row of the softmax is empty.
    visible = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1) if packed else None
    scored: list[int] = []
    targets: list[int] = []
    source: list[int] = []
    option: list[int] = []
    for r, (context, tails) in enumerate(rows):
        n = len(context)
        ids[r, :n] = torch.tensor(context)
        positions[r, :n] = torch.arange(n)
        if visible is not None:
            visible[r, :n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
        at = n
        first = len(scored)
        # The context's last token predicts the first token of every continuation.
        scored.append(r * width + n - 1)
        for index, tail in tails:
            k = len(tail) - 1
            ids[r, at : at + k] = torch.tensor(tail[:-1], dtype=torch.long)
            positions[r, at : at + k] = torch.arange(n, n + k)
            if visible is not None:
                visible[r, at : at + k, :n] = True
                visible[r, at : at + k, at : at + k] = torch.ones(k, k, dtype=torch.bool).tril()
            source += [first, *range(len(scored), len(scored) + k)]
            scored += range(r * width + at, r * width + at + k)
            targets += tail
            option += [index] * (k + 1)
            at += k
        kinds[r, :at] = torch.tensor(row_roles(n, at - n))
    inputs = {"input_ids": ids.to(device)}
    if visible is not None:
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        inputs |= {"attention_mask": mask.unsqueeze(1).to(device), "position_ids": positions.to(device)}
    owners = [d for d, document in enumerate(documents) for _ in document.pairs]
    place = {"dtype": torch.long, "device": device}
    return Batch(
        inputs,
        torch.tensor(scored, **place),  # type: ignore[arg-type]
        torch.tensor(targets, **place),  # type: ignore[arg-type]
        torch.tensor(source, **place),  # type: ignore[arg-type]
        torch.tensor(option, **place),  # type: ignore[arg-type]
        torch.tensor(owners, **place),  # type: ignore[arg-type]
        tuple(documents),
        min(len(context) for context, _ in rows) if packed else 0,
        kinds.to(device),
    )


def continuation_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (S, vocabulary) at the batch's scored positions; the head sees no other position."""
    with causal_prefix(batch.causal, batch.inputs["input_ids"].shape[1]), roles(batch.roles):
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


_NOTHING = 1e-12  # a share of the largest gradient, far below what float32 can add to it


class _TokenLogprobs(torch.autograd.Function):
    """``log_softmax(logits)[source, targets]`` whose gradient is made in the one buffer that is kept.

    Autograd's own would fill and read two more tables of S x vocabulary numbers, which for small
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
        # Options that a softmax has all but ruled out weigh 1e-30 and less. Kept, their share of the table
        # would be subnormal numbers, with which products take ten times as long, and no sum would feel it.
        gradient = gradient.masked_fill(gradient.abs() < _NOTHING * gradient.abs().max(), 0.0)
        rows.index_add_(0, source, gradient)
        table.exp_().mul_(-rows.unsqueeze(1))
        table.index_put_((source, targets), gradient, accumulate=True)
        return table.to(ctx.dtype), None, None


def token_budget_batches(
    documents: Sequence[Document], packed: bool, budget: int
) -> Iterator[tuple[int, ...]]:
    """Group document indices, in the order given, so that rows x width stays within ``budget``.

    A document that alone exceeds the budget gets a batch of its own.
    """
    group: list[int] = []
    rows = width = 0
    for index, document in enumerate(documents):
        more_rows = rows + document.rows(packed)
        wider = max(width, document.tokens(packed))
        if group and more_rows * wider > budget:
            yield tuple(group)
            group, more_rows, wider = [], document.rows(packed), document.tokens(packed)
        group.append(index)
        rows, width = more_rows, wider
    if group:
        yield tuple(group)


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
    """Make passes start at block ``layer``: blocks below do nothing, it answers with ``output``.

    Everything around the blocks (masks, rotary tables, final norm, head, logit scaling) runs as
    the model defines it, so no family needs code of its own. Hooks on block ``layer`` still fire.
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
