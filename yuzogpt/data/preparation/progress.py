"""Shows the progress of a preparation: a bar on a terminal, plain lines elsewhere.

It reads the records that units leave when they are done, so it works with any workers.
"""

import sys
import threading
import time
from typing import Any

from tqdm import tqdm

from yuzogpt.console.quantities import time_left
from yuzogpt.console.terminal import note
from yuzogpt.data.preparation import shards
from yuzogpt.data.preparation.plan import Plan

POLL_INTERVAL_S = 0.5
LINE_INTERVAL_S = 5.0  # between plain lines
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}B [{elapsed}<{remaining}{postfix}]"


class Progress:
    """A context manager that shows progress until its block ends."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.remaining = {unit.index: unit for unit in plan.listing.units}
        self.bytes = self.documents = self.tokens = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._count_done()
        # The speed counts only what is done from here on.
        self.bytes_before, self.documents, self.tokens = self.bytes, 0, 0
        self.started = self.last_line = time.monotonic()
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=self.plan.listing.bytes,
                initial=self.bytes,
                unit_scale=True,
                bar_format=BAR,
                desc=self.plan.corpus,
            )
        self.thread.start()
        return self

    def __exit__(self, kind: object, error: object, _traceback: object) -> None:
        self.ended.set()
        self.thread.join()
        self._count_done()
        self._show(last=kind is None)
        if self.bar is not None:
            self.bar.close()
        if isinstance(error, KeyboardInterrupt | SystemExit):
            units = len(self.plan.listing.units)
            note(f"{units - len(self.remaining)} of {units} units are kept")

    def _watch(self) -> None:
        while not self.ended.wait(POLL_INTERVAL_S):
            self._count_done()
            self._show(last=False)

    def _count_done(self) -> None:
        """Add the units that were done since the last call."""
        names = {path.name for path in self.plan.staging.glob("unit-*.json")}
        for index, unit in list(self.remaining.items()):
            path = shards.record_path(self.plan.staging, index)
            record = self.plan.record(unit) if path.name in names else None
            if record:
                del self.remaining[index]
                self.bytes += unit.bytes
                self.documents += record.documents
                self.tokens += record.tokens

    def _show(self, last: bool) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        read_bytes = self.bytes - self.bytes_before
        speed = (
            f"{self.tokens / seconds / 1e6:.2f} million tokens/s, "
            f"{self.documents / seconds:,.0f} documents/s, {read_bytes / seconds / 1e6:.1f} MB/s"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(speed, refresh=False)
            self.bar.update(self.bytes - self.bar.n)
        elif read_bytes and (last or time.monotonic() - self.last_line >= LINE_INTERVAL_S):
            self.last_line = time.monotonic()
            total = max(1, self.plan.listing.bytes)
            left = (total - self.bytes) / read_bytes * seconds
            done = 100 * self.bytes / total
            note(f"{done:.0f}%: {speed}, ETA {time_left(left)}")
