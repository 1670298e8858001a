"""Prices of energy and of machine time, set by the user."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """Power and costs of the machine; None where the user sets nothing. Money is in the user's currency."""

    watts: float | None = None  # power of the machine
    per_kwh: float | None = None
    per_hour: float | None = None
