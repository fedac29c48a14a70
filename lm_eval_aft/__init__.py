"""Activation Fine-Tuning for lm-evaluation-harness.

Importing the package is cheap (no torch, no lm-eval) and makes ``--model aft`` known to the harness; the
names below are loaded when they are first used.
"""

from lm_eval_aft import registration

TYPE_CHECKING = False  # typing is too slow for a module read at every start of Python; checkers know the name
if TYPE_CHECKING:
    from lm_eval_aft._util.errors import AFTError
    from lm_eval_aft.evaluation.report import compare
    from lm_eval_aft.evaluation.run import evaluate_pair
    from lm_eval_aft.library.load import load_vector
    from lm_eval_aft.steering.hooks import attach
    from lm_eval_aft.steering.vector import SteeringVector
    from lm_eval_aft.training.run import train_vector

__version__ = "0.2.0"

__all__ = [
    "AFTError",
    "SteeringVector",
    "__version__",
    "attach",
    "compare",
    "evaluate_pair",
    "load_vector",
    "train_vector",
]

# Public name -> the module that defines it.
_HOMES = {
    "AFTError": "lm_eval_aft._util.errors",
    "SteeringVector": "lm_eval_aft.steering.vector",
    "attach": "lm_eval_aft.steering.hooks",
    "compare": "lm_eval_aft.evaluation.report",
    "evaluate_pair": "lm_eval_aft.evaluation.run",
    "load_vector": "lm_eval_aft.library.load",
    "train_vector": "lm_eval_aft.training.run",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next access does not come through here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Start-up files are not read from PYTHONPATH or `--target` folders, nor by an interpreter that already runs.
registration.install()
