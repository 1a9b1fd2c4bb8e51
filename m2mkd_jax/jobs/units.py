"""Large numbers and sizes as people read them."""

from __future__ import annotations


def si(number: float) -> str:
    """A number with three digits and a prefix: 1.23 T."""
    unit, prefix = unit_of(float(f"{number:.3g}"))  # 999.9 k is 1 M
    return f"{number / unit:.3g} {prefix}".strip()


def unit_of(number: float) -> tuple[float, str]:
    """The largest unit that is no larger than a number, and its prefix: 1e12 and T."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**power:
            return 10.0**power, prefix
    return 1.0, ""


def binary_size(count: float) -> str:
    """Bytes as B, KiB, MiB, GiB or TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if float(f"{count:.4g}") < 1024:  # 1023.99 KiB are 1 MiB
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
