"""Dividing candidates among the processes of `accelerate launch` or `torchrun`.

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

    On GPUs loading the model has joined them already. On CPUs this does: accelerate's `PartialState` takes
    each process there for the only one unless ACCELERATE_USE_CPU is set.
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
        """Whether this process writes files and prints."""
        return self.rank == 0

    def shard(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """This process's part; since layers differ in cost, each process gets every ``size``-th one."""
        ordered = sorted(candidates, key=lambda candidate: (candidate.layer, candidate.name))
        return ordered[self.rank :: self.size]

    def exchange(self, candidates: Sequence[Candidate]) -> None:
        """Bring all candidates to the state in which the process that trains them has left them."""
        if self.size == 1:
            return
        packed = {}
        for candidate in self.shard(candidates):
            tensors, values = candidate.state()
            packed[candidate.name] = ({key: tensor.cpu() for key, tensor in tensors.items()}, values)
        states = {name: state for part in self.gather(packed) for name, state in part.items()}
        for candidate in candidates:
            if candidate.name not in packed:
                candidate.restore(*states[candidate.name])

    def broadcast(self, value: Any) -> Any:
        """The first process's ``value``, in all of them."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in the order of ranks, in all of them."""
        if self.size == 1:
            return [value]
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, value)
        return parts
