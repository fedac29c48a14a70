"""Vectors without training: what sets right answers' hidden states apart from wrong ones'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lm_eval_aft.backbone import Backbone
from lm_eval_aft.packing import Document, capture, continuation_logits, make_batch, token_budget_batches
from lm_eval_aft.positions import GENERATED
from lm_eval_aft.steering import hidden_states

TOKENS = 4096  # in one pass


@torch.no_grad()
def mean_differences(
    model: nn.Module, backbone: Backbone, documents: Sequence[Document], window: int
) -> dict[int, Tensor]:
    """For every layer, shape ``(hidden_size,)``, fp32: right options' hidden states minus wrong ones'.

    Contrastive activation addition (Rimsky et al. 2024, arXiv:2312.06681), for options of several
    tokens: an option's activation is the mean of the block's output over the option's own tokens, read
    behind its context; a document's difference is the mean of its right options' minus the mean of its
    wrong ones'; the vector is the mean over documents. Where a document has one continuation only
    (generation tasks), the next document's stands in for the wrong one.

    Args:
        window: most tokens in a row; longer contexts are cut on the left.
    """
    depth = len(backbone.blocks)
    totals = {layer: torch.zeros(backbone.hidden_size, dtype=torch.float64) for layer in range(depth)}
    contrasted = _with_wrong_options(documents)
    rows = [_whole(document, window) for document in contrasted]
    parameter = next(model.parameters())
    for indices in token_budget_batches(rows, False, TOKENS):
        chosen = [rows[i] for i in indices]
        batch = make_batch(chosen, False, parameter.device, parameter.dtype)
        with capture(backbone, range(depth)) as outputs:
            continuation_logits(model, batch)
        weights = _weights(chosen)
        for layer, output in outputs.items():
            hidden = hidden_states(output).float()
            own = (batch.roles == GENERATED).to(hidden.device).unsqueeze(-1)
            means = (hidden * own).sum(1) / own.sum(1)
            totals[layer] += (means.double().cpu() * weights.unsqueeze(1)).sum(0)
    return {layer: (total / len(rows)).float() for layer, total in totals.items()}


def _with_wrong_options(documents: Sequence[Document]) -> list[Document]:
    found = []
    for i, document in enumerate(documents):
        if len(document.pairs) == 1:
            context, own = document.pairs[0]
            _, other = documents[(i + 1) % len(documents)].pairs[0]
            document = Document(((context, own), (context, other)), (0,), (1.0, 1.0))
        found.append(document)
    return found


def _whole(document: Document, window: int) -> Document:
    """The document with a token more behind each option, so that the options' last tokens are read too."""
    pairs = []
    for context, tail in document.pairs:
        kept = tail[: window - 1]
        pairs.append((context[-(window - len(kept)) :], (*kept, kept[-1])))
    return Document(tuple(pairs), document.gold, document.lengths)


def _weights(documents: Sequence[Document]) -> Tensor:
    """What each option (row) counts for: right ones sum to 1 in a document, wrong ones to -1."""
    weights: list[float] = []
    for document in documents:
        right = set(document.gold)
        n = len(document.pairs)
        wrong = max(1, n - len(right))
        weights += [1 / len(right) if i in right else -1 / wrong for i in range(n)]
    return torch.tensor(weights, dtype=torch.float64)
