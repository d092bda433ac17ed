"""Times as capture files write them."""

import datetime as dt


def culture(at: dt.datetime) -> str:
    """A time as .NET writes it in en-US: `12/9/2022 4:51:25 PM`, UTC, whole seconds."""
    return f"{at.month}/{at.day}/{at.year} {at.hour % 12 or 12}:{at:%M:%S} {'AM' if at.hour < 12 else 'PM'}"
