"""Prices of energy and of machine time, set by the user, and the cost of a duration."""

from __future__ import annotations

from dataclasses import dataclass

from ds_gpt2.common.formatting import HOUR
from ds_gpt2.monitoring.pace import Range


@dataclass(frozen=True)
class Prices:
    """Power and costs of the machine; None where the user sets nothing. Money is in the user's currency."""

    watts: float | None = None  # power of the machine
    per_kwh: float | None = None
    per_hour: float | None = None


@dataclass(frozen=True)
class Cost:
    """Cost of a duration. Money is in the currency of the prices."""

    watts: float | None
    watts_recorded: bool  # by the GPUs, without the rest of the machine
    energy_kwh: Range | None
    energy_money: Range | None
    hours_money: Range | None


def cost_of(seconds: Range, recorded_watts: float | None, prices: Prices) -> Cost | None:
    """Return the cost of ``seconds``; None if neither the power nor the price of an hour is known.

    Args:
        recorded_watts: power of the GPUs, used if the prices do not include the power.
    """
    watts = prices.watts if prices.watts is not None else recorded_watts
    if watts is None and prices.per_hour is None:
        return None
    hours = seconds.times(1 / HOUR)
    energy = None if watts is None else hours.times(watts / 1000)
    return Cost(
        watts=watts,
        watts_recorded=prices.watts is None and watts is not None,
        energy_kwh=energy,
        energy_money=None if energy is None or prices.per_kwh is None else energy.times(prices.per_kwh),
        hours_money=None if prices.per_hour is None else hours.times(prices.per_hour),
    )
