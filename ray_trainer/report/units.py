"""Times and numbers for people."""

from datetime import UTC, datetime


def readable_age(seconds: float) -> str:
    """A duration for people, in its two largest units."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = max(0, round(seconds))
    for place, (unit, size) in enumerate(units):
        if left >= size:
            amount, left = divmod(left, size)
            smaller = units[place + 1] if place + 1 < len(units) else None
            rest = left // smaller[1] if smaller else 0
            return f"{amount} {unit}" + (f" {rest} {smaller[0]}" if smaller and rest else "")
    return "0 s"


def readable_time(time: float) -> str:
    """A UNIX time, in UTC."""
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"


def readable_number(value: float) -> str:
    """Four digits that count."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e7 else f"{value:.4g}"
