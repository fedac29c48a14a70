"""One vector at every layer, trained together."""

from __future__ import annotations

from lm_eval_aft.methods.base import Constant


class AllLayers(Constant):
    """Adds ``v_L`` at each of ``n`` layers. ``n d`` parameters: 24,576 for 24 layers of size 1024."""

    name = "all-layers"
    formula = "v_L at every layer L"
    count = "n d"
    together = True
