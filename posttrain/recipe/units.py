"""Numbers for people."""

from __future__ import annotations


def count_text(number: float) -> str:
    """`1.5M`, `20.5k`, `7`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def bytes_text(number: float) -> str:
    """`1.5 GiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def operations_text(number: float) -> str:
    """`1.2e+18 FLOP` as `1.2 EFLOP`."""
    for unit, size in (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} FLOP"
