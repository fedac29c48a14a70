"""``--offline``: nothing asks the network, whatever the environment says."""

from __future__ import annotations

import os
import sys

import click

from lm_eval_aft.private_names import gone

# Read by huggingface_hub, transformers and datasets when they are first imported.
_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def go_offline() -> None:
    """Have models, vectors and data come from local folders and caches alone."""
    os.environ.update(dict.fromkeys(_SWITCHES, "1"))
    # Imported already, in a notebook or a test: these are what the switches were read into.
    for module, names, key in (
        (
            "huggingface_hub.constants",
            ("HF_HUB_OFFLINE",),
            "huggingface_hub: constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE",
        ),
        (
            "datasets.config",
            ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
            "datasets: config.HF_HUB_OFFLINE, config.HF_DATASETS_OFFLINE",
        ),
    ):
        there = [name for name in names if hasattr(sys.modules.get(module), name)]
        if module in sys.modules and not there:
            raise gone(key)
        for name in there:
            setattr(sys.modules[module], name, True)


def _switch(_context: click.Context, _parameter: click.Parameter, on: bool) -> None:
    if on:
        go_offline()


offline_option = click.option(
    "--offline",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_switch,
    help="Ask nothing of the network: local folders and caches only.",
)
