"""A method with its tensors, as applied to a model's blocks, and which tokens of a pass it steers."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.steering.methods import METHODS, Method

logger = logging.getLogger(__name__)
# What is done at a block: a vector (hidden_size,) is added, or a function gives the new hidden states.
Shift = Tensor | Callable[[Tensor], Tensor]


@dataclass
class Intervention:
    """What steers a model: a method with its tensors, its coefficient and its positions.

    Attributes:
        tensors: by the names they have in a vector file; see `lm_eval_aft.steering.methods`.
        coefficient: multiplies what is added.
        positions: which tokens are steered; see `lm_eval_aft.steering.intervention`.
        tracker: works out the tokens' roles in passes where nobody states them.
    """

    method: Method
    tensors: dict[str, Tensor]
    coefficient: float = 1.0
    positions: str = "all"
    tracker: RoleTracker | None = None

    @classmethod
    def static(cls, layer: int, vector: Tensor) -> Intervention:
        """One vector (hidden_size,) at one layer."""
        return cls(METHODS["static"], {f"layers.{layer}": vector})

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers steered, ascending."""
        found = (name.partition(".") for name in self.tensors)
        return tuple(sorted(int(index) for prefix, _, index in found if prefix == "layers"))

    def shifts(self) -> dict[int, Shift]:
        """What is done at each layer; nothing at coefficient 0."""
        if not self.coefficient:
            return {}
        if self.method.constant and self.positions == "all":
            return {layer: self._vector(layer) for layer in self.layers}
        return {layer: self._steer(layer) for layer in self.layers}

    def _vector(self, layer: int) -> Tensor:
        vector = self.tensors[f"layers.{layer}"]
        return vector if self.coefficient == 1 else vector * self.coefficient

    def _steer(self, layer: int) -> Callable[[Tensor], Tensor]:
        def steer(hidden: Tensor) -> Tensor:
            if self.positions != "all" and is_unsteered():
                return hidden
            own = {name: tensor.to(hidden.device) for name, tensor in self.tensors.items()}
            wide = hidden.to(own[f"layers.{layer}"].dtype)
            delta = self.method.delta(own, layer, wide) * self.coefficient
            steered = hidden + delta.to(hidden.dtype)
            mask = mask_for(self.positions, hidden, self.tracker)
            return steered if mask is None else torch.where(mask, steered, hidden)

        return steer


# Which tokens of a forward pass are steered: the role of each token, and the roles that a vector steers.
#
# A token's *role* is padding, context, last token of the context, or continuation. Code that lays out its
# own rows states the roles (`roles`). Elsewhere `RoleTracker` works them out from the model's inputs, and
# during generation from the prompt that `generate` was called with; where that is not enough, steering only
# some of the tokens is an error.

# The roles of an input token: padding, context, the context's last token, continuation.
PADDING, CONTEXT, LAST, GENERATED = range(4)
# The roles that each choice of positions steers.
POSITIONS: dict[str, tuple[int, ...]] = {
    "all": (PADDING, CONTEXT, LAST, GENERATED),
    "prompt": (CONTEXT, LAST),
    "last": (LAST,),
    "generated": (GENERATED,),
}
_NO_PASS = "the blocks were called without the model"
_NO_INPUTS = "the model was called without input_ids"
_HINT = (
    "Use `model.generate`, wrap your own decoding loop in "
    "`with generating_from(input_ids, attention_mask):`, or steer all positions."
)


@contextmanager
def _during(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


# Whether hooks made now belong to one model object, so that its copies are to be without them.
_one_model_only: ContextVar[bool] = ContextVar("one_model_only", default=False)


def one_model_only() -> AbstractContextManager[None]:
    """Hooks made inside the block are not copied with the model."""
    return _during(_one_model_only, True)


class Hook:
    """A hook of a module. Copies of the model have it too, unless it steers for somebody who owns it.

    That somebody could remove it from the model, but not from a copy.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._left_out = _one_model_only.get()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._left_out:
            return Hook, (self._call,)
        logger.warning("A copy of a steered model is made: it is without the vector.")
        return Hook, (_does_nothing,)


def _does_nothing(*_: Any, **__: Any) -> None:
    pass


_roles: ContextVar[Tensor | None] = ContextVar("roles", default=None)
_unsteered: ContextVar[bool] = ContextVar("unsteered", default=False)


@contextmanager
def roles(table: Tensor | None) -> Iterator[None]:
    """State the tokens' roles in the passes made inside the block: (rows, tokens), integers as above.

    ``None`` changes nothing.
    """
    with _during(_roles, table if table is not None else _roles.get()):
        yield


@contextmanager
def unsteered() -> Iterator[None]:
    """Inside the block, vectors that steer only some positions do nothing."""
    with _during(_unsteered, True):
        yield


def is_unsteered() -> bool:
    """Whether the code runs inside `unsteered`."""
    return _unsteered.get()


def row_roles(context: int, continuation: int, width: int | None = None) -> list[int]:
    """Roles of a row of ``context`` and then ``continuation`` tokens, padded on the right to ``width``."""
    row = [*[CONTEXT] * (context - 1), *[LAST] * (context > 0), *[GENERATED] * continuation]
    return row + [PADDING] * ((width or len(row)) - len(row))


def prompt_roles(mask: Tensor) -> Tensor:
    """Roles (rows, tokens) of prompts whose padding ``mask`` (rows, tokens) marks with 0, on either side."""
    found = torch.where(mask > 0, CONTEXT, PADDING)
    tokens = found.shape[1]
    last = tokens - 1 - (found.flip(1) == CONTEXT).int().argmax(1)
    found[torch.arange(len(found), device=found.device), last] = LAST
    return found


@dataclass
class Prompt:
    """The prompt of a generation.

    Attributes:
        roles: (rows, columns) role of each column of the prompt.
        ids: (rows, known) token ids of its last columns; None where the prompt is given as embeddings.
        read: columns that passes have read so far; None while no pass has been seen.
        forward: whether every pass starts where the last one ended, as in all but assisted decoding.
    """

    roles: Tensor
    ids: Tensor | None
    read: int | None = None
    forward: bool = False

    @property
    def columns(self) -> int:
        """Columns of the prompt, padding and what a given cache holds already included."""
        return self.roles.shape[1]

    @classmethod
    def of(cls, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None = None) -> Prompt:
        """The prompt with these ids (rows, tokens) or embeddings, and ``mask`` (rows, columns).

        The mask may be wider than the ids: the columns before them are in a cache already.
        """
        given = ids if ids is not None else embeds
        if given is None or given.ndim < 2 or not given.shape[1]:
            raise AFTError("A prompt needs input_ids of shape (rows, tokens), and one token at least.", _HINT)
        if mask is None:
            mask = torch.ones(given.shape[:2], device=given.device)
        if mask.ndim != 2 or len(mask) != len(given) or (ids is not None and mask.shape[1] < ids.shape[1]):
            raise AFTError(
                f"The prompt's attention mask has shape {tuple(mask.shape)}, its tokens "
                f"{tuple(given.shape[:2])}.",
                "A mask of shape (rows, tokens), 0 where the prompt is padded, is needed.",
            )
        return cls(prompt_roles(mask), ids)

    def table(self, rows: int, start: int, width: int) -> Tensor:
        """Roles (rows, width) of the columns from ``start`` on; each prompt may have several rows."""
        mine = self.roles[:, start : start + width].repeat_interleave(rows // len(self.roles), 0)
        new = torch.full((rows, width - mine.shape[1]), GENERATED, device=mine.device)
        return torch.cat([mine, new], 1)

    def mismatch(self, inputs: Tensor, start: int) -> str:
        """Why a pass that reads ``inputs`` from column ``start`` on does not belong to this generation."""
        rows, width = inputs.shape[:2]
        if rows % len(self.roles):
            return f"a pass of {rows} rows during the generation from {len(self.roles)} prompts"
        if self.read is not None and start > self.read:
            return f"a pass that starts at token {start}, where {self.read} have been read"
        if start >= self.columns:
            return ""
        if inputs.ndim > 2 or self.ids is None:
            # Virtual tokens in front of the prompt would move it.
            fits = start + width <= self.columns
            return "" if fits else f"a pass over {width} embeddings, of which the prompt is a part"
        known = self.columns - self.ids.shape[1]  # the columns before lie in a cache
        first, end = max(start, known), min(start + width, self.columns)
        if first >= end:
            return ""
        wanted = self.ids[:, first - known : end - known].repeat_interleave(rows // len(self.roles), 0)
        same = torch.equal(inputs[:, first - start : end - start].to(wanted.device), wanted)
        return "" if same else "a pass that reads neither the prompt nor what follows it"


# The current generation: whose it is (None: any model's), and its prompt.
_generation: ContextVar[tuple[object, Prompt] | None] = ContextVar("generation", default=None)


@contextmanager
def generating_from(input_ids: Tensor, attention_mask: Tensor | None = None) -> Iterator[None]:
    """State the prompt for the passes of your own decoding loop, including the first.

    ``model.generate`` does not need this. Elsewhere a pass without a cache is taken for a prompt, and a
    single token after a filled cache for a generated one; anything ambiguous raises an error.

    Args:
        input_ids: (rows, tokens) the prompts.
        attention_mask: (rows, tokens) 0 where they are padded; default: nowhere.

    >>> with attach(model, vector), generating_from(prompt):  # doctest: +SKIP
    ...     ids = prompt
    ...     for _ in range(20):
    ...         logits = model(ids, use_cache=False).logits
    ...         ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    """
    with _during(_generation, (None, Prompt.of(input_ids, attention_mask))):
        yield


class RoleTracker:
    """Works out the tokens' roles in each pass where nobody states them.

    During ``model.generate`` the roles follow from the prompt it was called with and from how many columns
    precede a pass, whatever kind of cache holds them (or none); passes are compared with the prompt's tokens.
    Elsewhere a pass without a cache reads a prompt, padded where its attention mask says so, and a single
    token after a cache was generated.

    Args:
        model: the model as users call it, possibly wrapped (PEFT).
        blocks: dotted path of its block list, `Backbone.name`: passes are watched from the model down to
            the module that holds the blocks, since wrappers call inner modules directly.
    """

    def __init__(self, model: nn.Module, blocks: str) -> None:
        self._here = threading.local()
        self._users = 0
        self._undo: list[Callable[[], None]] = []
        for module in _path(model, blocks):
            with one_model_only():
                before, after = Hook(self._before), Hook(self._after)
            self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._undo.append(module.register_forward_hook(after, always_call=True).remove)
            if callable(getattr(type(module), "generate", None)):
                self._watch_generate(module)

    @classmethod
    def of(cls, model: nn.Module, blocks: str) -> RoleTracker:
        """The watcher of this model; it stays until `remove` has been called as often as this."""
        found = model.__dict__.get("_aft_passes")
        if not isinstance(found, RoleTracker):
            found = cls(model, blocks)
            model.__dict__["_aft_passes"] = found
            found._undo.append(partial(model.__dict__.pop, "_aft_passes", None))
        found._users += 1
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies of the model are not watched

    def remove(self) -> None:
        """Stop watching the model, unless another vector on it needs it."""
        self._users -= 1
        if self._users == 0:
            while self._undo:
                self._undo.pop()()

    def roles(self) -> Tensor | str:
        """Roles (rows, tokens) of the current pass, or why they are unknown."""
        return getattr(self._here, "seen", _NO_PASS)

    def _watch_generate(self, module: Any) -> None:
        """Record each generation's prompt: an attribute of this one model hides its class's method."""
        own: dict[str, Any] = module.__dict__
        hidden, watched = own.get("generate"), _WatchedGenerate(self, module)

        def undo() -> None:
            if own.get("generate") is not watched:
                return  # hidden by another wrapper; without users this one only passes calls on
            if hidden is None:
                del own["generate"]
            else:
                own["generate"] = hidden

        own["generate"] = watched
        self._undo.append(undo)

    def generate(self, module: Any, stock: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model's own ``generate`` gives, with its prompt recorded."""
        active = _generation.get()
        # A draft's own `generate` inside that of the same model goes on from the outer prompt.
        if not self._users or is_unsteered() or (active is not None and active[0] in (None, self)):
            return stock(*args, **kwargs)
        given = {**_bound(stock, args), **kwargs}
        with _during(_generation, (self, _generation_prompt(module, given))):
            return stock(**given)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = self._here
        here.depth = getattr(here, "depth", 0) + 1
        if here.depth > 1 and here.seen != _NO_INPUTS:
            return  # the inputs of an outer module, as the user gave them, say more
        if _roles.get() is None and not is_unsteered():
            here.seen = self._work_out({**_named(module, args), **kwargs})
        else:
            here.seen = "their roles were stated"

    def _after(self, *_: Any) -> None:
        self._here.depth = max(0, getattr(self._here, "depth", 0) - 1)
        if not self._here.depth:
            self._here.seen = _NO_PASS

    def _work_out(self, inputs: Mapping[str, Any]) -> Tensor | str:
        given = next(
            (inputs[name] for name in ("input_ids", "inputs_embeds") if isinstance(inputs.get(name), Tensor)),
            None,
        )
        if given is None or given.ndim < 2:
            return _NO_INPUTS
        rows, width = given.shape[:2]
        mask = inputs.get("attention_mask")
        wide = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        past, unknown = _columns_before(inputs.items())
        active = _generation.get()
        if active is not None and active[0] in (None, self):
            return self._in_generation(active[1], given, past, unknown, wide)
        if past is None and unknown:
            return f"it is not known how many tokens {unknown} holds"
        if past is None:
            past = wide - width if wide is not None else 0
        if past > 0:
            self._here.ids = None
            if width > 1:
                return f"{width} tokens behind a cache may belong to the prompt or be generated"
            return torch.full((rows, width), GENERATED, device=given.device)
        if mask is not None and wide is None:
            return "the attention mask given does not say where the prompt is padded"
        grown = self._continues_the_last(given)
        self._here.ids = given
        if grown:
            return "the tokens of the pass before have grown: without a cache, which are new is not known"
        if not isinstance(mask, Tensor):
            mask = torch.ones(rows, width, device=given.device)
        return prompt_roles(mask[:, -width:])

    def _in_generation(
        self, prompt: Prompt, given: Tensor, past: int | None, unknown: str, wide: int | None
    ) -> Tensor | str:
        rows, width = given.shape[:2]
        behind = None if wide is None else wide - width
        if past is None:
            if behind is None and unknown and not (prompt.forward and prompt.read is not None):
                return f"it is not known how many tokens {unknown} holds"
            # What a state-space model keeps has no length, but cannot be taken back either.
            past = (prompt.read or 0) if behind is None and unknown else behind or 0
        elif behind is not None and behind != past:
            return f"the cache holds {past} tokens, by the attention mask {behind} were read"
        reason = prompt.mismatch(given, past)
        if reason:
            return reason
        prompt.read = past + width
        return prompt.table(rows, past, width).to(given.device)

    def _continues_the_last(self, given: Tensor) -> bool:
        """Whether the pass before read the same tokens, without the last of these."""
        before = getattr(self._here, "ids", None)
        if before is None or given.ndim > 2 or before.ndim > 2:
            return False
        rows, width = before.shape
        if len(given) != rows or given.shape[1] <= width or before.device != given.device:
            return False
        return torch.equal(given[:, :width], before)


class _WatchedGenerate:
    """A model's ``generate``, as an attribute of the one model; copies of it have their class's."""

    def __init__(self, tracker: RoleTracker, module: Any) -> None:
        self._tracker, self._module, self._stock = tracker, module, module.generate
        update_wrapper(self, self._stock)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracker.generate(self._module, self._stock, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _bound_method, (type(self._module).generate, self._module)


def _bound_method(function: Callable[..., Any], owner: Any) -> MethodType:
    return MethodType(function, owner)  # the type itself cannot be pickled


def mask_for(positions: str, hidden: Tensor, tracker: RoleTracker | None = None) -> Tensor | None:
    """Which of ``hidden`` (rows, tokens, width) are steered: (rows, tokens, 1); None for all of them.

    Raises:
        AFTError: nothing says what the tokens are.
    """
    if positions == "all":
        return None
    table: Tensor | str | None = _roles.get()
    if table is None:
        table = tracker.roles() if tracker else "the model is not watched"
    if isinstance(table, Tensor) and table.shape != hidden.shape[:2]:
        table = f"roles of {tuple(table.shape)} tokens for hidden states of {tuple(hidden.shape[:2])}"
    if isinstance(table, str):
        raise AFTError(
            f"Positions {positions!r}: nothing says which tokens of this pass belong to the prompt: {table}.",
            _HINT,
        )
    table = table.to(hidden.device)
    steered = torch.zeros(table.shape, dtype=torch.bool, device=table.device)
    for role in POSITIONS[positions]:
        steered |= table == role
    return steered.unsqueeze(-1)


def _path(model: nn.Module, blocks: str) -> list[nn.Module]:
    """The model and the modules inside it that hold its blocks, from the outside in."""
    found, module = [model], model
    for name in blocks.split(".")[:-1]:
        module = getattr(module, name)
        found.append(module)
    return found


def _named(module: nn.Module, args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments by the names that the module's ``forward`` gives them."""
    if not args:
        return {}
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # A wrapper's `*args` name nothing; ids come first in every causal model of transformers.
    named += ["input_ids", *(f"argument {i}" for i in range(1, len(args)))][len(named) :]
    return dict(zip(named, args, strict=False))


def _columns_before(inputs: Iterable[tuple[str, Any]]) -> tuple[int | None, str]:
    """How many columns the cache among a model's ``inputs`` holds; None without such a cache.

    Caches are recognised by type, since the name of the argument differs between releases of transformers: an
    object with ``get_seq_length``, or a tuple of each block's tensors (rows, heads, columns, width). The
    second result names a cache that does not tell its length.
    """
    unknown = ""
    for name, value in inputs:
        if value is None or isinstance(value, bool | int | float | str | Tensor | nn.Module):
            continue
        if callable(getattr(value, "get_seq_length", None)):
            try:
                return int(value.get_seq_length()), ""
            except Exception:  # a cache of states alone has no length
                unknown = name
        elif isinstance(value, tuple | list):
            if value and isinstance(value[0], tuple | list):
                first = value[0][0] if value[0] else None
                if isinstance(first, Tensor) and first.ndim == 4:
                    return first.shape[-2], ""
                unknown = name
        elif any(word in f"{name} {type(value).__name__}".lower() for word in ("cache", "past", "state")):
            unknown = name
    return None, unknown


def _generation_prompt(module: nn.Module, given: dict[str, Any]) -> Prompt:
    """The prompt of a call of ``generate`` with the arguments ``given``.

    A mask that `generate` would infer from padding tokens is added to them, so that both use the same one.
    """
    config = given.get("generation_config") or getattr(module, "generation_config", None)

    def setting(name: str) -> Any:
        return given[name] if given.get(name) is not None else getattr(config, name, None)

    if setting("guidance_scale") not in (None, 1):
        raise AFTError(
            "Classifier-free guidance reads a second prompt: which of its tokens to steer is not defined.",
            "Leave guidance_scale out, or steer all positions.",
        )
    ids = next((given[n] for n in ("inputs", "input_ids") if isinstance(given.get(n), Tensor)), None)
    embeds, mask = given.get("inputs_embeds"), given.get("attention_mask")
    if ids is not None and ids.ndim > 2:
        ids, embeds = None, ids
    if embeds is not None and ids is not None and ids.shape[1] != embeds.shape[1]:
        ids = None
    if ids is None and embeds is None:
        raise AFTError("A generation without a prompt cannot be steered at some positions.", _HINT)
    past, unknown = _columns_before((name, value) for name, value in given.items() if "config" not in name)
    if mask is None and (past or unknown):
        raise AFTError(
            "A generation that goes on from a filled cache needs a mask of all tokens read so far.",
            "Pass attention_mask, (rows, tokens in the cache and new ones).",
        )
    pad, ends = setting("pad_token_id"), setting("eos_token_id")
    ends = ends if isinstance(ends, list | tuple) else [ends]
    if mask is None and ids is not None and isinstance(pad, int) and pad not in ends:
        mask = given["attention_mask"] = (ids != pad).long()
    prompt = Prompt.of(ids, mask, embeds)
    prompt.read = None if unknown else past or 0
    prompt.forward = setting("assistant_model") is None and setting("prompt_lookup_num_tokens") is None
    return prompt


def _bound(function: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of ``generate`` by name; a wrapper's `*args` begin with ``inputs``."""
    named = [p.name for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
    named = ["inputs" if name == "args" else name for name in named]
    if len(args) > len(named):
        raise AFTError("generate was called with more positional arguments than it names.", "Name them.")
    return dict(zip(named, args, strict=False))
