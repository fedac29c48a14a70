"""Losses over a document's options, given each option's score and which are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm_eval_aft.errors import AFTError

CHOICE_LOSSES = ("cross-entropy", "margin")
DEFAULT_MARGIN = 1.0


@dataclass(frozen=True)
class ChoiceLoss:
    """What the ``choice`` objective makes of a document's option scores ``s`` in nats.

    ``cross-entropy``: -log of the probability, by a softmax over ``s``, of any right option. With
    label smoothing ``e`` it is ``(1 - e)`` times that, plus ``e`` times the mean over all options of
    -log of their probability (Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7,
    with the uniform distribution over the document's own options).

    ``margin``: the hinge ``max(0, margin - (best right s - best wrong s))``; 0 where every option is
    right. Only documents nearer to the border than the margin have a gradient.

    Attributes:
        name: ``cross-entropy`` or ``margin``.
        margin: nats the best right option should lead by.
        label_smoothing: ``e``, in [0, 1).
    """

    name: str = "cross-entropy"
    margin: float = DEFAULT_MARGIN
    label_smoothing: float = 0.0

    @classmethod
    def of(
        cls, name: str | None = None, margin: float | None = None, label_smoothing: float | None = None
    ) -> ChoiceLoss:
        """The loss that these settings name; ``None`` is the default.

        Raises:
            AFTError: an unknown loss, a number out of range, or a number that the loss does not use.
        """
        name = name or "cross-entropy"
        if name not in CHOICE_LOSSES:
            raise AFTError(f"There is no choice loss {name!r}.", f"Use one of: {', '.join(CHOICE_LOSSES)}.")
        if margin is not None and name != "margin":
            raise AFTError(f"margin={margin:g} means nothing to {name}.", "Add --choice-loss margin.")
        if label_smoothing and name != "cross-entropy":
            raise AFTError(
                f"Label smoothing is for cross-entropy; the choice loss is {name!r}.",
                "Leave out --label-smoothing, or --choice-loss.",
            )
        if margin is not None and not 0 < margin < float("inf"):
            raise AFTError(f"margin={margin:g} makes no sense.", "Give a positive number of nats.")
        if label_smoothing is not None and not 0 <= label_smoothing < 1:
            raise AFTError(f"label_smoothing={label_smoothing:g} makes no sense.", "Give 0 or more, below 1.")
        return cls(name, DEFAULT_MARGIN if margin is None else float(margin), float(label_smoothing or 0))

    def __call__(self, scores: Tensor, gold: Tensor) -> Tensor:
        """Loss in nats of every document, shape (documents,); differentiable.

        Args:
            scores: (documents, options) in nats, padded with -inf.
            gold: (documents, options) whether an option is right.
        """
        right = scores.masked_fill(~gold, -torch.inf)
        if self.name == "margin":
            lead = right.amax(1) - scores.masked_fill(gold, -torch.inf).amax(1)
            return (self.margin - lead).clamp(min=0)
        total = scores.logsumexp(1)
        loss = total - right.logsumexp(1)
        if not self.label_smoothing:
            return loss
        options = scores.isfinite()
        mean = scores.masked_fill(~options, 0.0).sum(1) / options.sum(1)
        return (1 - self.label_smoothing) * loss + self.label_smoothing * (total - mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for headers: the name and the number that this loss uses."""
        used = "margin" if self.name == "margin" else "label_smoothing"
        return {"name": self.name, used: getattr(self, used)}

    def __str__(self) -> str:
        if self.name == "margin":
            return f"margin of {self.margin:g} nats"
        return f"{self.name}, label smoothing {self.label_smoothing:g}" if self.label_smoothing else self.name
