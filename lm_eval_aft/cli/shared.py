"""Options that commands take over from `train-vector`, and what a plan is made of from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from lm_eval_aft.cli.train import train_vector

PROMPTS = ("num_fewshot", "apply_chat_template", "system_instruction", "fewshot_as_multiturn")


def training_options(*names: str) -> Callable[[Any], Any]:
    """Give a command these options of `train-vector`, in its words."""
    known = {option.name: option for option in train_vector.params}

    def add(command: click.Command) -> click.Command:
        command.params += [known[name] for name in names]
        return command

    return add


def plan_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `TrainingPlan.of` takes, from options of `train-vector`; those not given are left out.

    Raises:
        AFTError: an option that cannot be read.
    """
    from lm_eval_aft.training.examples import PromptSettings
    from lm_eval_aft.training.protocols import parse_numbers, parse_rungs

    parsers = {"lr": parse_numbers, "l2": parse_numbers, "rungs": parse_rungs}
    settings: dict[str, Any] = {
        name: parsers[name](value) if name in parsers else value
        for name, value in options.items()
        if value is not None and name not in (*PROMPTS, "include_path")
    }
    settings["prompts"] = PromptSettings(
        **{name: options[name] for name in PROMPTS if options.get(name) is not None}
    )
    return settings | {"include_path": tuple(options.get("include_path") or ())}


def scoring_flags(options: Mapping[str, Any]) -> list[str]:
    """The same prompts as flags of ``lm_eval run``."""
    from lm_eval_aft.training.examples import PromptSettings  # torch

    given = {key: options[key] for key in PROMPTS if options.get(key) is not None}
    flags = PromptSettings(**given).flags()
    for folder in options.get("include_path") or ():
        flags += ["--include_path", str(folder)]
    return flags
