"""Values of dataclass fields that come from files: of the kind their annotation says, or refused."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from lm_eval_aft.errors import AFTError

_KINDS: dict[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "text"),
    "bool": (bool, "true or false"),
}


def check_field_types(instance: Any) -> None:
    """Check the fields that are annotated as int, float, str or bool, perhaps or None; others pass.

    Raises:
        AFTError: a value of another kind; its name and the value are told.
    """
    for field in fields(instance):
        name, _, rest = str(field.type).partition(" | ")
        if name not in _KINDS or rest not in ("", "None"):
            continue
        value, (kind, wanted) = getattr(instance, field.name), _KINDS[name]
        if value is None and rest:
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise AFTError(f"{field.name}={str(value)[:80]!r} makes no sense.", f"It should be {wanted}.")
