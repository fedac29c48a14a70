"""Sharing candidates out among the processes of `accelerate launch` or `torchrun`.

Candidates do not depend on each other, so each process trains some of them on all documents; nothing
is exchanged within an epoch, and every vector is the same as one process would find.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import Any

from torch import distributed

from lm_eval_aft.training.candidate import Candidate


class Workers:
    """The processes of this run; one, where there is no launcher.

    On GPUs loading the model has joined them already; on CPUs, where lm-eval runs each process by
    itself, this does.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        if not distributed.is_available():
            return
        if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            distributed.init_process_group("gloo")
            atexit.register(distributed.destroy_process_group)
        if distributed.is_initialized():
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def shard(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """This process's part; layers, which differ in cost, are dealt out in turn."""
        dealt = sorted(candidates, key=lambda candidate: (candidate.layer, candidate.name))
        return dealt[self.rank :: self.size]

    def exchange(self, candidates: Sequence[Candidate]) -> None:
        """Bring every process's candidates to the state their owners have left them in."""
        if self.size == 1:
            return
        states = [(candidate.name, *candidate.state()) for candidate in self.shard(candidates)]
        mine = {name for name, _, _ in states}
        known = {candidate.name: candidate for candidate in candidates}
        packed = [
            (name, {key: tensor.cpu() for key, tensor in tensors.items()}, values)
            for name, tensors, values in states
        ]
        for part in self._gathered(packed):
            for name, tensors, values in part:
                if name not in mine:
                    known[name].restore(tensors, values)

    def broadcast(self, value: Any) -> Any:
        """The first process's ``value``, in all of them."""
        return value if self.size == 1 else self._gathered(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in the order of ranks, in all of them."""
        return [value] if self.size == 1 else self._gathered(value)

    def _gathered(self, value: Any) -> list[Any]:
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, value)
        return parts
