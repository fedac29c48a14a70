"""A vector without training: the difference between right and wrong answers' hidden states."""

from __future__ import annotations

from lm_eval_aft.methods.base import Constant


class CAA(Constant):
    """Contrastive activation addition (Rimsky et al. 2024, arXiv:2312.06681).

    Adds the mean over training documents of the right option's mean hidden state minus the wrong
    options'. ``d`` numbers, none of them trained: 1,024 at hidden size 1024. How the hidden states
    are taken is `lm_eval_aft.training.contrast`'s matter.
    """

    name = "caa"
    formula = "mean of right options' h - mean of wrong options' h"
    count = "d (not trained)"
    trained = False
