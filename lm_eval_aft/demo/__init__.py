"""The embedded demonstration model: where it lies and what the name ``demo`` means."""

from __future__ import annotations

import logging
from pathlib import Path

NAME = "demo"
logger = logging.getLogger(__name__)


def model_path() -> Path:
    """Folder of the embedded model, to be loaded by ``from_pretrained``."""
    return Path(__file__).parent / "model"


def resolve_pretrained(name: str) -> str:
    """``demo`` means the embedded model, unless a folder ``./demo`` is there: that one wins."""
    if name != NAME:
        return name
    if Path(NAME).is_dir():
        logger.warning("Using the folder ./%s, not the embedded demo model of the same name.", NAME)
        return name
    return str(model_path())


def command_name(pretrained: str) -> str:
    """A model as commands should name it: the embedded one is ``demo``, unless that would mean a folder."""
    return NAME if pretrained == str(model_path()) and not Path(NAME).is_dir() else pretrained
