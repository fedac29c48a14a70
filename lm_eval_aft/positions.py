"""Which tokens of a pass are steered: what each of them is, and which kinds a vector speaks of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft.errors import AFTError

# What an input token is: padding, of the context, the context's last, or of the continuation.
PADDING, CONTEXT, LAST, GENERATED = range(4)
# The kinds of token that each choice of positions steers.
POSITIONS: dict[str, tuple[int, ...]] = {
    "all": (PADDING, CONTEXT, LAST, GENERATED),
    "prompt": (CONTEXT, LAST),
    "last": (LAST,),
    "generated": (GENERATED,),
}
_roles: ContextVar[Tensor | None] = ContextVar("roles", default=None)


@contextmanager
def roles(table: Tensor | None) -> Iterator[None]:
    """Say what the tokens of the passes made inside the block are: (rows, tokens), integers as above.

    With ``None`` the block changes nothing.
    """
    token = _roles.set(table if table is not None else _roles.get())
    try:
        yield
    finally:
        _roles.reset(token)


def row_roles(context: int, continuation: int, width: int | None = None) -> list[int]:
    """Roles of a row of ``context`` and then ``continuation`` tokens, padded on the right to ``width``."""
    row = [*[CONTEXT] * (context - 1), *[LAST] * (context > 0), *[GENERATED] * continuation]
    return row + [PADDING] * ((width or len(row)) - len(row))


class Passes:
    """Works out from a model's own inputs what the tokens of each pass are.

    A pass without anything in the key-value cache reads a prompt, whose attention mask says where it
    is padded; a pass behind a cache reads tokens that were generated. What `roles` says goes first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: Tensor | None = None
        self._handle = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def remove(self) -> None:
        """Stop watching the model."""
        self._handle.remove()

    def roles(self) -> Tensor | None:
        """Roles (rows, tokens) of the pass at hand, where the model was called itself."""
        return self._seen

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = kwargs.get("input_ids", args[0] if args else None)
        if found is None:
            found = kwargs.get("inputs_embeds")
        if not isinstance(found, Tensor):
            self._seen = None
            return
        rows, tokens = found.shape[:2]
        past = kwargs.get("past_key_values")
        if past is not None and int(past.get_seq_length()) > 0:
            self._seen = torch.full((rows, tokens), GENERATED, device=found.device)
            return
        mask = kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2:
            mask = torch.ones(rows, tokens, device=found.device)
        seen = torch.where(mask[:, -tokens:] > 0, CONTEXT, PADDING)
        last = tokens - 1 - (seen.flip(1) == CONTEXT).int().argmax(1)
        seen[torch.arange(rows, device=seen.device), last.to(seen.device)] = LAST
        self._seen = seen


def mask_for(positions: str, hidden: Tensor, passes: Passes | None = None) -> Tensor | None:
    """Which of ``hidden`` (rows, tokens, width) are steered: (rows, tokens, 1); None for all of them.

    Raises:
        AFTError: nothing says what the tokens are.
    """
    if positions == "all":
        return None
    known = (_roles.get(), passes.roles() if passes else None)
    fitting = [each for each in known if each is not None and each.shape == hidden.shape[:2]]
    if not fitting:
        raise AFTError(
            f"Positions {positions!r}: nothing says which tokens of this pass belong to the prompt.",
            "Call the model itself with input_ids, or steer all positions.",
        )
    table = fitting[0].to(hidden.device)
    steered = torch.zeros(table.shape, dtype=torch.bool, device=table.device)
    for role in POSITIONS[positions]:
        steered |= table == role
    return steered.unsqueeze(-1)
