"""What steers a model at the moment: a vector, a router over several, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lm_eval_aft.backbone import find_backbone
from lm_eval_aft.fingerprint import fingerprint
from lm_eval_aft.library import Library
from lm_eval_aft.library.fits import Identity
from lm_eval_aft.positions import Passes
from lm_eval_aft.routing import Routing
from lm_eval_aft.steering import RowSteering, SteeringHandle, attach, check_fits, deltas
from lm_eval_aft.vector import SteeringVector


class InForce:
    """One model and what is in force on it; at first nothing.

    Attributes:
        vector: the vector in force, with the coefficient and positions it is applied with.
        routing: what picks the vectors, if a router does.
        rows: the router's vectors, on the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, blocks: str | None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.blocks = blocks
        self.vector: SteeringVector | None = None
        self.routing: Routing | None = None
        self.rows: RowSteering | None = None
        self._handle = SteeringHandle([])

    @property
    def masked(self) -> bool:
        """Whether anything in force steers some of the tokens only."""
        return any(vector.positions != "all" and vector.coefficient for vector in self._vectors())

    @property
    def kinds(self) -> frozenset[tuple[str, str]]:
        """Method and positions of everything in force."""
        return frozenset((vector.method, vector.positions) for vector in self._vectors())

    @property
    def state(self) -> int:
        """Which of a router's vectors steers the rows at hand, counted from 1; 0 without a router."""
        return 0 if self.rows is None else self.rows.state

    def vector_in(self, state: int) -> SteeringVector | None:
        """The vector that steers rows in a state: without a router the vector in force."""
        if self.routing is None:
            return self.vector
        return list(self.routing.vectors.values())[state - 1] if state else None

    def _vectors(self) -> Sequence[SteeringVector]:
        if self.routing is not None:
            return list(self.routing.vectors.values())
        return [] if self.vector is None else [self.vector]

    def clear(self) -> None:
        """Make this the baseline."""
        self._handle.remove()
        if self.rows is not None:
            self.rows.remove()
        self.vector = self.routing = self.rows = None

    def use(
        self, vector: SteeringVector, coefficient: float | None, positions: str | None, allow_mismatch: bool
    ) -> None:
        """Put one vector in force, with the coefficient and positions given or its own."""
        self.clear()
        vector = vector.adjusted(coefficient, positions)
        self._handle = attach(
            self.model, vector, tokenizer=self.tokenizer, allow_mismatch=allow_mismatch, blocks=self.blocks
        )
        self.vector = vector

    def follow(self, routing: Routing) -> None:
        """Put a router's vectors in force, each on the rows of the documents it picks them for."""
        self.clear()
        backbone = find_backbone(self.model, self.blocks)
        for vector in routing.vectors.values():
            check_fits(vector, backbone)
        routing.forget()
        vectors = routing.vectors.values()
        some = any(vector.positions != "all" for vector in vectors)
        passes = Passes.of(self.model, backbone.name) if some else None
        self.rows = RowSteering(backbone, [deltas(vector, passes=passes) for vector in vectors])
        self._handle = SteeringHandle([] if passes is None else [passes])
        self.routing = routing

    def open_routing(self, spec: str, library: Library, name: str, allow_mismatch: bool) -> Routing:
        """A router over those vectors of a library that fit the model, which messages call ``name``."""
        backbone = find_backbone(self.model, self.blocks)
        sketch = fingerprint(self.model, self.tokenizer)
        identity = Identity(name, backbone.hidden_size, len(backbone.blocks), sketch, weights=True)
        return Routing.open(spec, library, identity, allow_mismatch=allow_mismatch)
