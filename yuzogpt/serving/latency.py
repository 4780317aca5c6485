"""The recent latency of requests, for Retry-After. Imports nothing: Serve's proxy uses it, too."""

INITIAL_GUESS_S = 5.0
NEWEST_WEIGHT = 0.1


class LatencyAverage:
    """An exponential moving average of request latencies."""

    def __init__(self) -> None:
        self.seconds = INITIAL_GUESS_S

    def update(self, seconds: float) -> None:
        """Add the latency of a request."""
        self.seconds += NEWEST_WEIGHT * (seconds - self.seconds)
