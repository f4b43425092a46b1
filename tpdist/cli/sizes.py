"""Bytes as people read them."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(num_bytes: int) -> str:
    """In the largest unit that gives at least 1, as in "15.9 GiB" or "418.0 KiB"."""
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {UNITS[unit]}" if unit else f"{num_bytes} B"
