"""The types of the values of settings, and the base class of their sections."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole_number(value: object) -> object:
    """Parse text as a decimal integer without leading zeros; ``_`` may separate groups of digits."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)", value, re.ASCII):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number, such as 250 or 524_288")
    return value


def _decimal_number(value: object) -> object:
    """Parse text as a number: ``0.1``, ``1e-4``, ``.5`` or an integer."""
    number = r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)?(\.[0-9]*)?([eE][+-]?[0-9]+)?"
    if isinstance(value, str) and re.search("[0-9]", value) and re.fullmatch(number, value, re.ASCII):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number, such as 0.1 or 6e-4")
    return value


Int = Annotated[int, BeforeValidator(_whole_number)]
Float = Annotated[float, BeforeValidator(_decimal_number)]

# Limits beyond what any run needs; within them no arithmetic overflows and no memory is exhausted.
_LARGEST, _SMALLEST = 10**9, 1e-12

PositiveInt = Annotated[Int, Field(gt=0, le=_LARGEST)]
Count = Annotated[Int, Field(ge=0, le=_LARGEST)]
Seed = Annotated[Int, Field(ge=0, le=10**15)]
Size = Annotated[Int, Field(gt=0, le=10**6)]  # one dimension of a tensor
PositiveFloat = Annotated[Float, Field(ge=_SMALLEST, le=_LARGEST, allow_inf_nan=False)]
NonNegativeFloat = Annotated[Float, Field(ge=0, le=_LARGEST, allow_inf_nan=False)]
AboveOne = Annotated[Float, Field(gt=1, le=_LARGEST, allow_inf_nan=False)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of settings, immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
