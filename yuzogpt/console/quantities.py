"""Bytes and seconds formatted for people."""


def in_bytes(count: float) -> str:
    """Format a number of bytes: 1.5 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def time_left(seconds: float) -> str:
    """Format a duration as HH:MM:SS; from one day on, in days."""
    if seconds >= 86400:
        return f"{seconds / 86400:.1f} days"
    whole = max(0, int(seconds))
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"
