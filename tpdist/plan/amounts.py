"""Bytes and ratios in sentences for people."""

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def amount(num_bytes: int) -> str:
    """In the largest unit that gives at least 1, as in "15.9 GiB"."""
    value, unit = float(num_bytes), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{num_bytes} bytes"


def exact_amount(num_bytes: int) -> str:
    """As `amount`, with the number itself: "15.9 GiB (17,072,495,001 bytes)"."""
    return f"{amount(num_bytes)} ({num_bytes:,} bytes)" if abs(num_bytes) >= 1024 else amount(num_bytes)
