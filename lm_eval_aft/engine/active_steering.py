"""What steers a model: one vector, or a router that picks one of a library's for each request."""

from __future__ import annotations

import hashlib
import inspect
import logging
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import canonical_json
from lm_eval_aft.library.entry import ModelIdentity, misfits
from lm_eval_aft.library.routers import ROUTERS, Router, make_router, question_of
from lm_eval_aft.library.store import Library
from lm_eval_aft.steering.backbone import Backbone, find_backbone
from lm_eval_aft.steering.fingerprint import check_fingerprint, fingerprint
from lm_eval_aft.steering.hooks import (
    Ownership,
    RowSteering,
    SteeringHandle,
    check_fits,
    layer_shifts,
    put_on,
)
from lm_eval_aft.steering.intervention import Hook, RoleTracker, one_model_only
from lm_eval_aft.steering.vector import SteeringVector, describe_vector
from lm_eval_aft.steering.vector_file import FILE_NAME, read_header

logger = logging.getLogger(__name__)
# In the record: requests that no vector steers.
NONE = "none"


@dataclass
class Routing:
    """A router, the vectors it may pick, and what it picked so far.

    Attributes:
        spec: as the user gave it.
        library: folder of the library.
        vectors: library name -> vector; their places, counted from 1, are the row states of
            `lm_eval_aft.steering.hooks.RowSteering`, and 0 is no steering.
        left_out: vectors of the library that are damaged or do not fit the model, with the reasons.
    """

    spec: str
    library: Path
    router: Router
    vectors: dict[str, SteeringVector]
    left_out: dict[str, str] = field(default_factory=dict)
    _picked: dict[str, dict[int, str]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, spec: str, library: Library, model: ModelIdentity | None = None, *, allow_mismatch: bool = False
    ) -> Routing:
        """Read a library's vectors and the router over those of them that fit the model.

        Args:
            spec: as `make_router` takes it, or the path of a keyword table alone.
            model: what the vectors must fit; ``None`` takes all.
            allow_mismatch: only width and depth must fit.

        Raises:
            AFTError: as `make_router`; what did not fit is then named too.
        """
        spec = whole_spec(spec)
        entries = [entry for entry in library.entries() if not entry.control]
        usable = [entry for entry in entries if not entry.error]
        if not usable:
            raise AFTError(
                f"The library {library.root} has no vectors to route to.", "`aft vectors add` adds one."
            )
        left_out = {entry.name: f"damaged: {entry.error}" for entry in entries if entry.error}
        for entry in usable:
            if model is None:
                break
            found = misfits(read_header(library.path(entry.name) / FILE_NAME), model)
            if found and not (allow_mismatch and found[0] not in ("hidden size", "number of blocks")):
                left_out[entry.name] = ", ".join(found)
        try:
            router = make_router(spec, [entry for entry in usable if entry.name not in left_out])
        except AFTError as error:
            told = "; ".join(f"{name}: {what}" for name, what in list(left_out.items())[:3])
            more = f" {len(left_out)} vectors do not fit this model ({told})." if told else ""
            raise AFTError(error.what + more, error.hint) from error
        for name, why in left_out.items():
            logger.warning("%s of %s is left out of routing: %s.", name, library.root, why)
        vectors = {name: SteeringVector.load(library.path(name)) for name in router.targets()}
        return cls(spec, library.root, router, vectors, left_out)

    def adjusted(self, coefficient: float | None = None, positions: str | None = None) -> Routing:
        """This routing with every vector's coefficient or positions replaced; ``None`` leaves them."""
        for name, vector in self.vectors.items():
            self.vectors[name] = vector.adjusted(coefficient, positions)
        return self

    def pick(self, task: str | None, doc_id: int | None, document: Any, prompt: str) -> str | None:
        """The library name of the vector for a document's request, or None; the choice is kept."""
        name = self.router.route(question_of(prompt, document), task)
        if task is not None and doc_id is not None:
            self._picked.setdefault(task, {})[doc_id] = name or NONE
        return name

    def states(self, requests: Sequence[Instance]) -> list[int]:
        """Each request's row state: the place of its vector among ``vectors``, or 0.

        A document's first request decides for all of its requests, so that its options are compared under
        one vector, even where they are part of the prompt or are scored without it.
        """
        places = {None: 0} | {name: place for place, name in enumerate(self.vectors, 1)}
        decided: dict[tuple[Any, ...], int] = {}
        found = []
        for number, each in enumerate(requests):
            key: tuple[Any, ...] = (each.task_name, each.doc_id)
            key = key if None not in key else (number,)
            if key not in decided:
                name = self.pick(each.task_name, each.doc_id, each.doc, str(each.args[0]))
                decided[key] = places[name]
            found.append(decided[key])
        return found

    def forget(self) -> None:
        """Begin a new record."""
        self._picked = {}

    def digest(self) -> str:
        """SHA-256 of what decides where a request goes, names resolved, comments left out."""
        return hashlib.sha256(canonical_json(self.router.described()).encode()).hexdigest()

    def depends_on(self) -> dict[str, Any]:
        """What answers under this routing depend on, besides the model and the request's text."""
        vectors = {name: vector.digest() for name, vector in self.vectors.items()}
        found: dict[str, Any] = {"router": self.digest(), "vectors": vectors}
        if self.router.by_request:
            # Two tasks may ask the same, and lm-eval's cache does not know the task; and of a document
            # answered in part it hands on the rest, whose first request may get another vector: another
            # run's answers cannot be used.
            found["run"] = uuid.uuid4().hex
        return found

    def info(self) -> dict[str, Any]:
        """What results files keep: router, vectors, and per task which documents got which.

        ``routes`` maps task -> library name or ``none`` -> document numbers, in order; under several
        processes they are those of this process.
        """
        routes: dict[str, dict[str, list[int]]] = {}
        for task, picked in sorted(self._picked.items()):
            for doc_id, name in sorted(picked.items()):
                routes.setdefault(task, {}).setdefault(name, []).append(doc_id)
        return {
            "router": self.spec,
            "router_sha256": self.digest(),
            "library": str(self.library),
            "vectors": {name: describe_vector(vector) for name, vector in self.vectors.items()},
            "left_out": dict(self.left_out),
            "counts": {task: {name: len(ids) for name, ids in each.items()} for task, each in routes.items()},
            "routes": routes,
        }


def whole_spec(spec: str) -> str:
    """A router's spec; the path of a table alone means a keyword table.

    Raises:
        AFTError: neither a router nor a file.
    """
    if spec.partition(":")[0] in ROUTERS:
        return spec
    if Path(spec).is_file():
        return f"keyword:{spec}"
    raise AFTError(
        f"There is no router {spec!r}, and no keyword table at that path.",
        f"Use one of: {', '.join(ROUTERS)}, with a table as in keyword:TABLE.yaml, or constant:NAME.",
    )


class ActiveSteering:
    """What steers a model for one `AFTLM`: one vector, a router over several, or (at first) nothing.

    It stays on the model until another one takes the model (`claim`), or another lm-eval model runs it;
    `in_force` puts it back.

    Attributes:
        vector: the active vector, with the coefficient and positions it is applied with.
        routing: what picks the vectors, if a router does.
        rows: the router's vectors, attached to the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, blocks: str | None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.blocks = blocks
        self.vector: SteeringVector | None = None
        self.routing: Routing | None = None
        self.rows: RowSteering | None = None
        self.ownership = Ownership.of(self.backbone)
        self._handle = SteeringHandle([])
        self.ownership.require_plain()

    @property
    def backbone(self) -> Backbone:
        """The model's decoder blocks."""
        return find_backbone(self.model, self.blocks)

    @property
    def masked(self) -> bool:
        """Whether any active vector steers only some of the tokens."""
        return any(vector.positions != "all" and vector.coefficient for vector in self.vectors)

    @property
    def kinds(self) -> frozenset[tuple[str, str]]:
        """Method and positions of every active vector."""
        return frozenset((vector.method, vector.positions) for vector in self.vectors)

    @property
    def state(self) -> int:
        """Which of a router's vectors steers the rows at hand, counted from 1; 0 without a router."""
        return 0 if self.rows is None else self.rows.state

    def vector_in(self, state: int) -> SteeringVector | None:
        """The vector that steers rows in a state; without a router, the active vector."""
        if self.routing is None:
            return self.vector
        return list(self.routing.vectors.values())[state - 1] if state else None

    @property
    def vectors(self) -> Sequence[SteeringVector]:
        """The active vector, or all that a router may pick."""
        if self.routing is not None:
            return list(self.routing.vectors.values())
        return [] if self.vector is None else [self.vector]

    def clear(self) -> None:
        """Make this the baseline."""
        self._change(None, None)

    def use(
        self, vector: SteeringVector, coefficient: float | None, positions: str | None, allow_mismatch: bool
    ) -> None:
        """Attach one vector, with the coefficient and positions given or its own."""
        self.clear()
        vector = vector.adjusted(coefficient, positions)
        check_fits(vector, self.backbone)
        check_fingerprint(vector.metadata, self.model, self.tokenizer, allow_mismatch=allow_mismatch)
        self._change(vector, None)

    def follow(self, routing: Routing) -> None:
        """Attach a router's vectors, each for the rows of the documents it is picked for."""
        self.clear()
        for vector in routing.vectors.values():
            check_fits(vector, self.backbone)
        routing.forget()
        self._change(None, routing)

    def _change(self, vector: SteeringVector | None, routing: Routing | None) -> None:
        with self.ownership.lock:
            self.release()
            self.vector, self.routing, self.rows = vector, routing, None
            self.claim()

    def claim(self) -> None:
        """Put this on the model, in place of what another one put there."""
        with self.ownership.lock:
            if self.ownership.held_by(self):
                return
            self.ownership.take(self)
            backbone = self.backbone
            if self.vector is not None:
                self._handle.add(put_on(self.model, backbone, self.vector))
            elif self.routing is not None:
                self._handle.add(self._put_on_rows(backbone, list(self.routing.vectors.values())))
            if self._handle:
                with one_model_only():
                    guard = Hook(partial(_let_go_for_others, weakref.ref(self)))
                self._handle.add(SteeringHandle([backbone.blocks[0].register_forward_pre_hook(guard)]))

    def _put_on_rows(self, backbone: Backbone, vectors: Sequence[SteeringVector]) -> SteeringHandle:
        handle = SteeringHandle([])
        tracker = None
        if any(vector.positions != "all" for vector in vectors):
            tracker = RoleTracker.of(self.model, backbone.name)
            handle.add(SteeringHandle([tracker]))
        shifts = [layer_shifts(vector, tracker=tracker) for vector in vectors]
        with one_model_only():
            if self.rows is None:
                self.rows = RowSteering(backbone, shifts)
            else:
                self.rows.put_on(shifts)
        handle.add(SteeringHandle([self.rows]))
        return handle

    def remove_when_gone(self) -> None:
        """Take everything off the model once nothing refers to this, since others may have the model."""
        weakref.finalize(self, self._handle.remove).atexit = False

    def release(self) -> None:
        """Take everything off the model; what steers it is put back by `claim`."""
        self._handle.remove()
        self.ownership.leave(self)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside the block the model is steered by this alone, and no other thread's `ActiveSteering`.

        Raises:
            AFTError: vectors are attached to the model besides; see `lm_eval_aft.attach`.
        """
        with self.ownership.lock:
            self.ownership.require_plain()
            self.claim()
            token = _in_force.set(self)
            try:
                yield
            finally:
                _in_force.reset(token)

    def open_routing(self, spec: str, library: Library, name: str, allow_mismatch: bool) -> Routing:
        """A router over those vectors of a library that fit the model, which messages call ``name``."""
        backbone = self.backbone
        sketch = fingerprint(self.model, self.tokenizer)
        identity = ModelIdentity(name, backbone.hidden_size, len(backbone.blocks), sketch, weights=True)
        return Routing.open(spec, library, identity, allow_mismatch=allow_mismatch)


_in_force: ContextVar[ActiveSteering | None] = ContextVar("in_force", default=None)


def _let_go_for_others(mine: Callable[[], ActiveSteering | None], *_: Any) -> None:
    """Before a pass that another lm-eval model makes, `hf` for one, take the vector off the model."""
    steering = mine()
    if steering is None or _in_force.get() is steering:
        return
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, LM):
            if getattr(caller, "active", None) is not steering:
                logger.warning(
                    "%s runs a model that --model aft steers: it runs it without the vector.",
                    type(caller).__name__,
                )
                steering.release()
            return
        frame = frame.f_back
