"""Workers of a Ray cluster between being asked for and being given a job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval_aft.errors import AFTError

LOSSES = 3  # workers lost over one job, or while starting, before it is given up


class Crew:
    """Ray's actors that have no job.

    A job given to one that the cluster has no room for would wait for ever, while others are idle.

    Attributes:
        free: those that are there.
        coming: those that are not yet, by the reference that tells when they are.
    """

    def __init__(self, ray: Any, make: Callable[[], Any]) -> None:
        self._ray, self._make = ray, make
        self.free: list[Any] = []
        self.coming: dict[Any, Any] = {}
        self._stillborn = 0

    def start(self) -> None:
        """Ask for one more."""
        actor = self._make()
        self.coming[actor.ready.remote()] = actor

    def arrived(self, reference: Any, alone: bool) -> None:
        """One that was coming is there, or never will be; ``alone``: nobody else is at work.

        Raises:
            AFTError: it failed to start, as all did before.
        """
        actor = self.coming.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._stillborn += 1
            if self._stillborn <= LOSSES:
                self.start()
            elif alone and not self.free and not self.coming:
                raise AFTError(
                    f"No worker could be started: {str(error).strip().rpartition(chr(10))[2]}",
                    "Check --runtime-env, and what is installed on the cluster's machines.",
                ) from error
        else:
            self.free.append(actor)
