"""Finding a vector by what the user calls it."""

from __future__ import annotations

import os

from lm_eval_aft.vector import SteeringVector


def load_vector(spec: str | os.PathLike[str] | SteeringVector) -> SteeringVector:
    """Load the vector that ``spec`` names: a vector folder, a ``.safetensors`` file, or itself.

    Raises:
        AFTError: nothing there, or not a vector.
    """
    return spec if isinstance(spec, SteeringVector) else SteeringVector.load(spec)
