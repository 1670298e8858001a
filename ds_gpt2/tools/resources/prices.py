"""Prices of energy and of machine time, as a user gives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """What a person says that the machine draws and costs; None where that is not said."""

    watts: float | None = None
    per_kwh: float | None = None
    per_hour: float | None = None
