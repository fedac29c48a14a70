"""The interventions: how what is added to the residual stream is parametrised."""

from __future__ import annotations

from lm_eval_aft.errors import AFTError
from lm_eval_aft.methods.all_layers import AllLayers
from lm_eval_aft.methods.base import Method
from lm_eval_aft.methods.caa import CAA
from lm_eval_aft.methods.drab import Drab
from lm_eval_aft.methods.drab_strong import DrabStrong
from lm_eval_aft.methods.mlp import MLP
from lm_eval_aft.methods.static import Static

METHODS: dict[str, Method] = {
    method.name: method for method in (Static(), Drab(), DrabStrong(), MLP(), AllLayers(), CAA())
}
DEFAULT = "static"

__all__ = ["DEFAULT", "METHODS", "Method", "find_method"]


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        AFTError: there is none.
    """
    if name not in METHODS:
        raise AFTError(f"There is no method {name!r}.", f"Choose one of: {', '.join(METHODS)}.")
    return METHODS[name]
