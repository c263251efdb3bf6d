"""Numbers as a person reads them."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

GIB = 2**30
DASH = "–"
_EXPONENT = re.compile(r"e(-?)\+?0*")
_SI = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def number(value: float | None, digits: int = 3) -> str:
    """`digits` decimals, thousands separated; whole numbers stay whole; very small ones in powers of ten."""
    if value is None or not math.isfinite(value):
        return DASH
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1e3):
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 10**-digits:
        return _short_exponent(f"{value:.2e}")
    return f"{value:,.{digits}f}"


def plain(value: object) -> str:
    """A setting as a person writes it: yes and no, thousands separated, lists in one line."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return _short_exponent(f"{value:g}")
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or DASH
    return str(value)


def setting(value: bool | int | float | str | None) -> str:
    """A setting as it stands in a configuration: `0.0002`, `true`, `16`, `null`."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.1f}" if value.is_integer() and abs(value) < 1e4 else _short_exponent(f"{value:.4g}")
    return str(value)


def instant(text: str) -> str:
    """A moment in ISO 8601 as `2026-11-24 09:30 UTC`; what is no moment stays as it is."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if moment.tzinfo else text


def size(count_bytes: float | None) -> str:
    """`3.25 GiB`, `512 MiB` or `16 KiB`: two decimals from a GiB on, none below."""
    if count_bytes is None:
        return DASH
    if abs(count_bytes) >= GIB:
        return f"{count_bytes / GIB:,.2f} GiB"
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if abs(count_bytes) >= unit:
            return f"{count_bytes / unit:,.0f} {name}"
    return f"{count_bytes:,.0f} B"


def short(count: float) -> str:
    """A count in three digits with k, M or B."""
    for unit, name in _SI:
        if abs(count) >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"


def duration(seconds: float | None) -> str:
    """`2 h 05 min`, `3 min 20 s`, `42 s` or `1.3 s`."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of one as per cent."""
    return DASH if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}%"


def interval(low_high: tuple[float, float] | None, digits: int = 3) -> str:
    """`1.234 to 1.345`."""
    return DASH if low_high is None else f"{number(low_high[0], digits)} to {number(low_high[1], digits)}"


def _short_exponent(text: str) -> str:
    """`1e-05` as `1e-5`."""
    return _EXPONENT.sub(r"e\1", text)
