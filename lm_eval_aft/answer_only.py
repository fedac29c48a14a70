"""The answer-only diagnostic: what a model makes of the answers when the questions are taken away."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval_aft.errors import AFTError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_SCORED = ("multiple_choice", "loglikelihood")


def without_contexts(requests: Sequence[Instance]) -> list[Instance]:
    """The same log-likelihood requests with an empty context each; the originals are left alone.

    lm-eval scores an empty context behind the model's prefix token. White space at a context's end
    goes with it, though with a context lm-eval would have counted it to the continuation.
    """
    found = []
    for request in requests:
        bare = copy.copy(request)
        bare.arguments = ("", *request.args[1:])
        found.append(bare)
    return found


def refuse_generation(requests: Sequence[Instance]) -> None:
    """Raise `AFTError` if there is anything to generate."""
    if requests:
        task = requests[0].task_name or "the task"
        raise AFTError(
            f"answer_only=true cannot generate, as {task} asks: without a question there is no answer whose "
            "style could be scored.",
            "Leave out generation tasks, or answer_only.",
        )


def scorable(tasks: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Which tasks can be scored without their questions, and why the others cannot.

    Args:
        tasks: name -> task, as lm-eval's ``TaskManager.load`` gives them.
    """
    kept, out = [], {}
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            out[name] = "its answers are generated"
        elif task.OUTPUT_TYPE not in _SCORED:
            out[name] = "its requests have no context to remove"
        elif getattr(task, "multiple_input", 0):
            out[name] = "its options stand in the contexts, so nothing would be left to tell them apart"
        else:
            kept.append(name)
    return kept, out


def require_scorable(tasks: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """As `scorable`; raises `AFTError` when no task is left."""
    kept, out = scorable(tasks)
    if not kept:
        reasons = "; ".join(f"{name}: {why}" for name, why in out.items())
        raise AFTError(
            f"No task can be scored without its questions ({reasons}).",
            "Leave out --answer-only, or add a multiple-choice task.",
        )
    return kept, out
