"""Numbers of the report as text, rounded to the precision of their spread."""

from __future__ import annotations

import math

from lightning_gradnorm.experiments.report.comparison import Spread


def spread_text(spread: Spread | None, *, signed: bool = False) -> str:
    """Return mean ± deviation, rounded to the precision of the deviation.

    Example:
        >>> spread_text(Spread(0.853217, 0.00421, 3)), spread_text(Spread(1234.5678, None, 1)), spread_text(None)
        ('0.8532 ± 0.0042', '1235', '')
        >>> spread_text(Spread(3.2e9, 4.1e8, 3)), spread_text(Spread(2.5e-9, None, 1))
        ('3.2e+09 ± 4.1e+08', '2.5e-09')
    """
    if spread is None:
        return ""
    sign = "+" if signed else ""
    if not math.isfinite(spread.mean):
        return "not finite"
    if not spread.deviation:
        digits = 2 if signed else max(0, 3 - _power(spread.mean))
        return fixed(spread.mean, digits, sign) + ("" if spread.deviation is None else " ± 0")
    digits = digits_of(spread.deviation)
    return f"{fixed(spread.mean, digits, sign)} ± {fixed(spread.deviation, digits, digits_of_power=2)}"


def fixed(value: float, digits: int, sign: str = "", *, digits_of_power: int = 4) -> str:
    """Return the number with that many decimals, or in scientific notation if it would be too long."""
    if digits > 7 or abs(value) >= 1e6:
        return f"{value:{sign}.{digits_of_power}g}"
    return f"{value:{sign}.{digits}f}"


def digits_of(deviation: float) -> int:
    """Return the number of decimals that shows two significant digits of it."""
    return max(0, 1 - _power(deviation)) if deviation else 4


def _power(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0


def signed(value: float) -> str:
    """Return the number with its sign and four significant digits."""
    return f"{value:+.4g}"
