"""One vector at one layer: the product."""

from __future__ import annotations

from lm_eval_aft.methods.base import Constant


class Static(Constant):
    """Adds ``v``, the same at every position. ``d`` parameters: 1,024 at hidden size 1024."""

    name = "static"
    formula = "v"
    count = "d"
