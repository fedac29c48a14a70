"""Settings classes: dataclasses whose values pydantic checks, with one clear line for each bad value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from functools import wraps
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass

from lm_eval_aft._util.errors import AFTError

T = TypeVar("T")


def _checked(value: Any, check: Callable[[Any], Any]) -> Any:
    # As it was given: 1 would become 1.0, and digests of settings would change.
    check(value)
    return value


_AsGiven = WrapValidator(_checked)
Number = Annotated[float, Field(allow_inf_nan=False), _AsGiven]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _AsGiven]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _AsGiven]
Share = Annotated[float, Field(gt=0, le=1), _AsGiven]
Count = Annotated[int, Field(ge=1)]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that checks the types and limits of its fields.

    Nothing is converted. Making an instance raises `AFTError` for a value that does not fit.

    >>> @settings
    ... class Speed:
    ...     metres_per_second: Positive
    >>> Speed(-1.0)
    Traceback (most recent call last):
    lm_eval_aft._util.errors.AFTError: metres_per_second=-1.0 is invalid.
    metres_per_second should be greater than 0.
    """
    made: Any = dataclass(cls, frozen=True, config=ConfigDict(strict=True, extra="forbid"))
    check = made.__init__

    @wraps(check)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            check(self, *args, **values)
        except ValidationError as error:
            raise _plain(error, list(made.__dataclass_fields__)) from error

    made.__init__ = __init__
    return made  # type: ignore[no-any-return]


def _plain(error: ValidationError, names: list[str]) -> AFTError:
    whats: dict[Any, str] = {}
    hints: dict[Any, str] = {}
    for fault in error.errors(include_url=False):
        place = fault["loc"][0]
        name = names[place] if isinstance(place, int) else place
        whats.setdefault(name, f"{name}={str(fault['input'])[:80]} is invalid.")
        reason = f"{name} {fault['msg'][0].lower()}{fault['msg'][1:]}."
        hints.setdefault(name, reason.replace("input should", "should"))
    return AFTError(" ".join(whats.values()), " ".join(hints.values()))
