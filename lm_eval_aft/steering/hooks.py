"""Putting vectors on a model, and whose they are: one for all rows, or several, each on rows of its own."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.steering.backbone import Backbone, find_backbone, is_compiled
from lm_eval_aft.steering.fingerprint import check_fingerprint
from lm_eval_aft.steering.intervention import Hook, Intervention, RoleTracker, Shift, one_model_only
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.steering.vector import SteeringVector

T = TypeVar("T")
U = TypeVar("U")


class Removable(Protocol):
    """A hook, or anything else with ``remove()``."""

    def remove(self) -> None: ...


class SteeringHandle:
    """A vector attached to a model. ``remove()`` detaches it; calling it twice is harmless."""

    def __init__(self, hooks: list[Removable]) -> None:
        self._hooks = hooks

    def __bool__(self) -> bool:
        """Whether anything is attached."""
        return bool(self._hooks)

    def add(self, hooks: SteeringHandle) -> None:
        """Remove what another handle would together with this."""
        self._hooks += hooks._hooks

    def remove(self) -> None:
        """Detach the vector."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> SteeringHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Owner(Protocol):
    """What steers a model, and lets go of it when another owner wants it."""

    def release(self) -> None:
        """Take everything off the model."""


@dataclass(eq=False)
class _Note:
    """One vector among those attached; removed with its hooks."""

    notes: list[_Note]
    what: str

    def remove(self) -> None:
        self.notes.remove(self)


@dataclass
class Ownership:
    """Whose vectors are on a model: those of `attach`, which add up, and those of one owner at a time."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    _notes: list[_Note] = field(default_factory=list)
    _owner: Callable[[], Owner | None] = lambda: None

    @classmethod
    def of(cls, backbone: Backbone) -> Ownership:
        """Of the model with these blocks, whatever wraps it."""
        return _OWNERSHIPS.setdefault(backbone.blocks[0], cls())

    def note(self, vector: SteeringVector) -> _Note:
        """Record that a vector was attached, until what this returns is removed."""
        layers = ", ".join(map(str, vector.layers))
        self._notes.append(note := _Note(self._notes, f"layer {layers}, {vector.digest()[:8]}"))
        return note

    def held_by(self, owner: Owner) -> bool:
        """Whether ``owner`` was the last to take the model."""
        return self._owner() is owner

    def take(self, owner: Owner) -> None:
        """Let ``owner`` have the model; the one before lets go of it."""
        before = self._owner()
        if before is not None and before is not owner:
            before.release()
        self._owner = weakref.ref(owner)

    def leave(self, owner: Owner) -> None:
        """Record that ``owner`` took everything off the model."""
        if self.held_by(owner):
            self._owner = lambda: None

    def require_plain(self) -> None:
        """Raise `AFTError` while vectors are attached to the model by `attach`."""
        if self._notes:
            raise AFTError(
                f"The model has vectors attached to it ({'; '.join(note.what for note in self._notes)}), so "
                "its answers would be taken for those of another vector, or of none.",
                "Call remove() on what attach() returned, or end its `with` block, before the model is used "
                "for something else; or load the model again.",
            )


_OWNERSHIPS: weakref.WeakKeyDictionary[nn.Module, Ownership] = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module,
    vector: SteeringVector,
    *,
    coefficient: float | None = None,
    tokenizer: Any = None,
    allow_mismatch: bool = False,
    blocks: str | None = None,
) -> SteeringHandle:
    """Steer a model: apply ``vector`` at the output of each of its layers until the handle is removed.

    One forward hook per layer covers plain forward passes, generation (it fires at each decode
    step) and wrapped (PEFT) models. ``h <- h + (coefficient * v)``: the product is formed in fp32,
    cast to the activation's dtype and moved to its device; nothing is written in place. Vectors attached
    inside one another add up; copies made of the model meanwhile are without them. A model compiled by
    ``torch.compile`` is compiled again: give the compiled one.

    Args:
        model: a transformers causal LM.
        vector: what to add.
        coefficient: replaces the vector's own coefficient. At 0 no hook is set at all, so the
            model stays bit-identical to the unsteered one.
        tokenizer: when given, its vocabulary is checked against the fingerprint as well.
        allow_mismatch: warn, rather than refuse, when the vector was trained on another model.
        blocks: dotted path of the model's block list, for unknown architectures.

    Raises:
        AFTError: another hidden size, a layer out of range, or another base model.

    >>> with attach(model, vector, coefficient=0.5):  # doctest: +SKIP
    ...     steered = model(**inputs).logits
    """
    backbone = find_backbone(model, blocks)
    check_fits(vector, backbone)
    check_fingerprint(vector.metadata, model, tokenizer, allow_mismatch=allow_mismatch)
    handle = put_on(model, backbone, vector.adjusted(coefficient))
    if handle:
        handle.add(SteeringHandle([Ownership.of(backbone).note(vector)]))
    return handle


def put_on(model: nn.Module, backbone: Backbone, vector: SteeringVector) -> SteeringHandle:
    """Attach a vector that fits the model, on somebody's behalf; nothing at coefficient 0."""
    handle = SteeringHandle([])
    try:
        tracker = None
        if vector.positions != "all" and vector.coefficient:
            tracker = RoleTracker.of(model, backbone.name)
            handle.add(SteeringHandle([tracker]))
        with one_model_only():
            handle.add(add_all(backbone, layer_shifts(vector, tracker=tracker)))
        if handle and is_compiled(model):
            handle.add(SteeringHandle([_CompileAgain()]))
    except BaseException:
        handle.remove()
        raise
    return handle


class _CompileAgain:
    """Compiled code does not notice hooks that are set or removed later: it is made anew, for both."""

    def __init__(self) -> None:
        torch.compiler.reset()

    def remove(self) -> None:
        torch.compiler.reset()


def layer_shifts(
    vector: SteeringVector, coefficient: float | None = None, tracker: RoleTracker | None = None
) -> dict[int, Shift]:
    """What the vector does at each of its layers, in fp32; nothing at coefficient 0.

    ``tracker`` knows the tokens' roles where nobody says them; see `lm_eval_aft.steering.intervention`.
    """
    factor = vector.coefficient if coefficient is None else float(coefficient)
    method = METHODS[vector.method]
    return Intervention(method, vector.tensors, factor, vector.positions, tracker).shifts()


def add_all(backbone: Backbone, shifts: Mapping[int, Shift]) -> SteeringHandle:
    """Add each shift at its layer's output until the handle is removed."""
    return SteeringHandle([add_at(backbone.blocks[layer], shift) for layer, shift in shifts.items()])


def check_fits(vector: SteeringVector, backbone: Backbone) -> None:
    """Raise `AFTError` unless the vector's layers and width exist in the model."""
    if vector.hidden_size != backbone.hidden_size:
        raise AFTError(
            f"The vector has hidden size {vector.hidden_size}, the model {backbone.hidden_size}.",
            "A vector only fits the model it was trained on (or a sibling of the same width).",
        )
    for layer in vector.layers:
        backbone.check_layer(layer)


def add_at(block: nn.Module, shift: Shift) -> torch.utils.hooks.RemovableHandle:
    """Hook ``block`` so that ``shift`` is added to its output: a vector (hidden_size,), or a function.

    Gradients flow to what requires them.
    """
    placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        if not isinstance(shift, Tensor):
            return with_hidden_states(output, shift(hidden))
        if shift.requires_grad:
            return with_hidden_states(output, hidden + shift.to(hidden.device, hidden.dtype))
        key = (hidden.device, hidden.dtype)
        if key not in placed:
            placed[key] = shift.to(hidden.device, hidden.dtype)
        return with_hidden_states(output, hidden + placed[key])

    return block.register_forward_hook(Hook(hook))


class RowSteering:
    """Several vectors attached to a model at once, each steering its own rows of the batch.

    Every row has a *state*: in state 0 nothing is added, in state k ``shifts[k - 1]``. Outside of
    `chosen` every row is in state 0.

    Args:
        shifts: what each vector does, by layer; see `layer_shifts`.
    """

    def __init__(self, backbone: Backbone, shifts: Sequence[Mapping[int, Shift]]) -> None:
        self.count = len(shifts)
        self._states: int | Sequence[int] = 0
        self._blocks = backbone.blocks
        self._handle = SteeringHandle([])
        self.put_on(shifts)

    @property
    def state(self) -> int:
        """The state of all rows in passes made now.

        Raises:
            AFTError: the rows differ.
        """
        if not isinstance(self._states, int):
            raise AFTError("Rows of one pass are in several states.")
        return self._states

    def put_on(self, shifts: Sequence[Mapping[int, Shift]]) -> None:
        """Attach these, in place of any that are."""
        self.remove()
        self._placed: dict[Any, Tensor] = {}
        for layer in sorted({layer for shift in shifts for layer in shift}):
            hook = self._blocks[layer].register_forward_hook(Hook(self._hook(layer, shifts)))
            self._handle.add(SteeringHandle([hook]))

    def remove(self) -> None:
        """Detach the vectors."""
        self._handle.remove()

    @contextmanager
    def chosen(self, states: int | Sequence[int]) -> Iterator[None]:
        """Inside the block, the rows of a pass have these states, or all of them this one."""
        before, self._states = self._states, states
        try:
            yield
        finally:
            self._states = before

    def apart(
        self, states: Sequence[int], items: Sequence[T], ask: Callable[[list[T]], Sequence[U]]
    ) -> list[U]:
        """``ask``'s answers to the items, which it is asked state by state, in the items' order.

        For code that forms its own batches, so that rows cannot have states of their own.
        """
        answers: dict[int, U] = {}
        for state in sorted(set(states)):
            mine = [i for i, each in enumerate(states) if each == state]
            with self.chosen(state):
                answers |= zip(mine, ask([items[i] for i in mine]), strict=True)
        return [answers[i] for i in range(len(items))]

    def _hook(self, layer: int, shifts: Sequence[Mapping[int, Shift]]) -> Callable[..., Any]:
        mine = {k: shift[layer] for k, shift in enumerate(shifts, 1) if layer in shift}
        vectors = {k: shift for k, shift in mine.items() if isinstance(shift, Tensor)}

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            states = self._states
            present = {states} if isinstance(states, int) else set(states)
            if present.isdisjoint(mine):
                return output
            hidden = hidden_states(output)
            if isinstance(states, int):
                return with_hidden_states(output, _shifted(hidden, mine[states]))
            if hidden.shape[0] != len(states):
                raise AFTError(f"A pass over {len(states)} rows has {hidden.shape[0]} rows of hidden states.")
            if present & set(mine) <= set(vectors):
                index = torch.tensor(states, device=hidden.device)
                table = self._table(layer, vectors, len(shifts), hidden)
                return with_hidden_states(output, hidden + table[index].unsqueeze(1))
            return with_hidden_states(output, _shifted_by_row(hidden, states, mine))

        return hook

    def _table(self, layer: int, vectors: dict[int, Tensor], count: int, like: Tensor) -> Tensor:
        """What is added in each state, (states, hidden_size), where that is a vector."""
        key = (layer, like.device, like.dtype)
        if key not in self._placed:
            zero = torch.zeros_like(next(iter(vectors.values())))
            table = torch.stack([vectors.get(state, zero) for state in range(count + 1)])
            self._placed[key] = table.to(like.device, like.dtype)
        return self._placed[key]


def _shifted(hidden: Tensor, shift: Shift) -> Tensor:
    return hidden + shift.to(hidden.device, hidden.dtype) if isinstance(shift, Tensor) else shift(hidden)


def _shifted_by_row(hidden: Tensor, states: Sequence[int], shifts: Mapping[int, Shift]) -> Tensor:
    """Rows whose state has no shift stay; a function is given all rows, and its own are used."""
    found = hidden
    index = torch.tensor(states, device=hidden.device)
    for state in set(states) & set(shifts):
        own = (index == state).reshape(-1, *[1] * (hidden.ndim - 1))
        found = torch.where(own, _shifted(hidden, shifts[state]), found)
    return found


def hidden_states(output: Any) -> Tensor:
    """The residual stream in a block's output: itself, or the first entry of a tuple or list."""
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise AFTError(f"A decoder block returned {type(found).__name__}, not a tensor of hidden states.")
    return found


def with_hidden_states(output: Any, hidden: Tensor) -> Any:
    """``output`` with its residual stream replaced by ``hidden``."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
