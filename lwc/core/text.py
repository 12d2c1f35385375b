"""Numbers and names as people read them: on the command line and in reports."""

from __future__ import annotations

import re

from lwc.core.errors import UsageError

__all__ = ["count", "factor", "kebab_case", "parse_size", "printable", "size", "time"]


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}

_SIZE = re.compile(r"([0-9.]+)\s*([KMG]I?|)B?", re.IGNORECASE)


def count(value: float | None) -> str:
    """Write a count with a decimal prefix: `134 M`."""
    return "–" if value is None else _scaled(value, ("", " k", " M", " G", " T", " P"))


_CONTROL = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


def printable(text: str) -> str:
    """Escape control characters, so that names in a model cannot steer the terminal."""
    return text.translate(_CONTROL)


def size(value: float | None) -> str:
    """Write bytes with a decimal prefix: `98.4 MB`."""
    return "–" if value is None else _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def parse_size(text: str) -> int:
    """Read a number of bytes: `2000000`, `2GB`, `1.5GiB`.

    Raises:
        UsageError: It is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    try:
        assert match is not None
        return int(float(match[1]) * _UNITS[match[2].upper()])
    except (AssertionError, ValueError, OverflowError):
        raise UsageError(f"'{text}' is no size in bytes", remedy="such as 2GB or 512MiB") from None


def kebab_case(name: str) -> str:
    """Write a Python name the way passes, rules and options are named: `FuseGelu2D` as
    `fuse-gelu2d`."""
    parted = re.sub(r"(?<=[a-z0-9A-Z])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "-", name)
    return parted.strip("_").replace("_", "-").lower()


def time(value: float | None) -> str:
    """Write seconds in the unit that fits: `8.7 ms`."""
    if value is None:
        return "–"
    for unit, length in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= length:
            scaled = value / length
            return f"{scaled:.3g} {unit}" if scaled < 999.5 else f"{scaled:.0f} {unit}"
    return f"{value * 1e9:.3g} ns"


def factor(after: float | None, before: float | None) -> str:
    """Write `after / before`: `0.21×`."""
    if after is None or not before:
        return "–"
    return f"{after / before:.3g}×"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value /= 1000
        step += 1
    return f"{value:.0f}{units[step]}" if step == 0 else f"{value:.3g}{units[step]}"
