"""Numbers of bytes and seconds as people write them."""


def in_bytes(count: float) -> str:
    """Write a number of bytes as people do."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def time_left(seconds: float) -> str:
    """Write how long something will take: HH:MM:SS, from a day on in days."""
    if seconds >= 86400:
        return f"{seconds / 86400:.1f} days"
    whole = max(0, int(seconds))
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"
