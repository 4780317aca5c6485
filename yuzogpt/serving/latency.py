"""How long calls take of late: what a client that is refused is told to wait for.

In: the seconds of each call that was answered. Out: their running mean. Imports nothing: Serve's
proxy has one, too.
"""

FIRST_GUESS = 5.0  # seconds that a call takes, before any has ended
WEIGHT = 0.1  # of the newest call


class LatencyAverage:
    """A running mean."""

    def __init__(self) -> None:
        """No call has ended yet."""
        self.seconds = FIRST_GUESS

    def note(self, seconds: float) -> None:
        """Take a call into account."""
        self.seconds += WEIGHT * (seconds - self.seconds)
