"""Experiment trackers (``--log``): TensorBoard, trackio, Weights & Biases and MLflow, by accelerate."""

from __future__ import annotations

import logging
import math
import netrc
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from lm_eval_aft import __version__
from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.process import is_main_process

logger = logging.getLogger(__name__)
PROJECT = "lm-eval-aft"
# Tracker -> the modules of which it needs one, and what pip installs.
TRACKERS = {
    "tensorboard": (("tensorboard", "tensorboardX"), "'lm-eval-aft[log]'"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
    "mlflow": (("mlflow",), "mlflow"),
}
# The environment's variables that may send it to another machine, and values by which they do not.
_REMOTE = {"trackio": ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"), "mlflow": ("MLFLOW_TRACKING_URI",)}
_LOCAL = ("file:", "sqlite:", "/", ".")
_LONGEST = 250  # characters of a setting; MLflow drops longer ones


class Trackers:
    """The trackers that a command logs to: several, one or none.

    They start with the first call of `settings`. A tracker that fails then or later is warned of once and
    left out: what is logged is also in the command's output folder, and no run ends for it. In other
    processes than the main one nothing is logged.

    Args:
        names: of `TRACKERS`.
        folder: the command's output folder, whose name is the run's; TensorBoard writes into
            ``folder/tensorboard``, the others where they are configured to.
        about: settings known beforehand.

    Raises:
        AFTError: an unknown name, a package that is not installed, or a tracker on another machine while
            offline.
    """

    def __init__(self, names: Sequence[str], folder: str | Path, **about: Any) -> None:
        self._names = list(dict.fromkeys(names))
        self._folder, self._about = Path(folder), about
        self._live: dict[str, Any] | None = None
        self._step = 0
        for name in self._names:
            _require(name)
        if not is_main_process():
            self._names = []

    def __bool__(self) -> bool:
        """Whether anything is logged."""
        return bool(self._names)

    def settings(self, values: Mapping[str, Any]) -> None:
        """Log settings, nested ones as ``outer.inner``, and start; only the first call counts."""
        if self._live is not None:
            return
        found = dict(_flat({"version": __version__, **self._about, **values}))
        self._live = {}
        for name in self._names:
            self._attempt(name, partial(self._start, name))
        self._each(lambda tracker: tracker.store_init_configuration(found))

    def log(self, values: Mapping[str, Any]) -> None:
        """Log numbers under ``names/like/this``, as one step; others and those not finite are left out."""
        found = {
            re.sub(r"[^\w./ -]", "_", name): value
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        if found:
            self._step += 1
            self._each(lambda tracker: tracker.log(found, step=self._step))

    def finish(self) -> None:
        """End the trackers' runs."""
        self._each(lambda tracker: tracker.finish())
        self._live = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def _start(self, name: str) -> None:
        if self._live is not None:
            self._live[name] = _start(name, self._folder)

    def _each(self, work: Callable[[Any], Any]) -> None:
        for name, tracker in list((self._live or {}).items()):
            self._attempt(name, partial(work, tracker))

    def _attempt(self, name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # whatever a tracker raises: it must not end the run
            if self._live:
                self._live.pop(name, None)
            told = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            logger.warning("%s failed, nothing more is logged to it; the run goes on. (%s)", name, told)


def _require(name: str) -> None:
    if name not in TRACKERS:
        raise AFTError(f"There is no tracker {name!r}.", f"Choose one of: {', '.join(TRACKERS)}.")
    modules, package = TRACKERS[name]
    if not any(find_spec(module) for module in modules):
        raise AFTError(f"--log {name} needs a package that is not installed.", f"pip install {package}")
    for variable in _REMOTE.get(name, ()):
        place = os.environ.get(variable)
        if place and not place.startswith(_LOCAL) and _offline():
            raise AFTError(
                f"--log {name} would use the network ({variable} is set), which is switched off.",
                f"Unset {variable} to log on this machine.",
            )


def _start(name: str, folder: Path) -> Any:
    """A started tracker of accelerate's."""
    from accelerate import PartialState, tracking

    PartialState()  # without it some of the classes refuse to write their own log
    run = folder.resolve().name
    made: Any
    if name == "tensorboard":
        made = tracking.TensorBoardTracker("tensorboard", logging_dir=folder)
    elif name == "wandb":
        # Without a key it would ask for one.
        mode = None if os.environ.get("WANDB_MODE") or (_wandb_key() and not _offline()) else "offline"
        made = tracking.WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), name=run, mode=mode)
    elif name == "trackio":
        made = tracking.TrackioTracker(PROJECT, name=run)
    else:
        made = tracking.MLflowTracker(PROJECT, run_name=run)
    made.start()
    return made


def _offline() -> bool:
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


def _wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings as trackers take them: texts, numbers and switches, under dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            kept = isinstance(value, bool | int | float) and math.isfinite(value)
            yield f"{prefix}{key}", value if kept else str(value)[:_LONGEST]
