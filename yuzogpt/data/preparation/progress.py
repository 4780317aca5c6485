"""What a person sees while a corpus is prepared: the speed, and when it will be done.

In: a plan. Out: one progress bar on a terminal, plain lines elsewhere. It reads the records that
units leave when they are done, so it knows nothing of who does them.
"""

import sys
import threading
import time
from typing import Any

from tqdm import tqdm

from yuzogpt.console.quantities import time_left
from yuzogpt.console.terminal import say
from yuzogpt.data.preparation import shards
from yuzogpt.data.preparation.plan import Plan

LOOK_EVERY = 0.5  # seconds
PLAIN_EVERY = 5.0  # seconds between plain lines, where there is no terminal
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}B [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Shown from `with Progress(plan):` to the end of the block."""

    def __init__(self, plan: Plan) -> None:
        """What is done already does not count for the speed."""
        self.plan = plan
        self.waiting = {unit.index: unit for unit in plan.listing.units}
        self.bytes = self.documents = self.tokens = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._look()
        self.bytes_before, self.documents, self.tokens = self.bytes, 0, 0
        self.started = self.last_plain = time.monotonic()
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> "Progress":
        """Begin to watch."""
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

    def __exit__(self, kind: object, *_: object) -> None:
        """Show the end."""
        self.ended.set()
        self.thread.join()
        self._look()
        self._show(last=kind is None)
        if self.bar is not None:
            self.bar.close()

    def _watch(self) -> None:
        while not self.ended.wait(LOOK_EVERY):
            self._look()
            self._show(last=False)

    def _look(self) -> None:
        """Count the units that were done since the last look."""
        names = {path.name for path in self.plan.staging.glob("unit-*.json")}
        for index, unit in list(self.waiting.items()):
            path = shards.record_path(self.plan.staging, index)
            record = self.plan.record(unit) if path.name in names else None
            if record:
                del self.waiting[index]
                self.bytes += unit.bytes
                self.documents += record.documents
                self.tokens += record.tokens

    def _show(self, last: bool) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        bytes_here = self.bytes - self.bytes_before
        speed = (
            f"{self.tokens / seconds / 1e6:.2f} million tokens/s, "
            f"{self.documents / seconds:,.0f} documents/s, {bytes_here / seconds / 1e6:.1f} MB/s"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(speed, refresh=False)
            self.bar.update(self.bytes - self.bar.n)
        elif bytes_here and (last or time.monotonic() - self.last_plain >= PLAIN_EVERY):
            self.last_plain = time.monotonic()
            total = max(1, self.plan.listing.bytes)
            left = (total - self.bytes) / bytes_here * seconds
            done = 100 * self.bytes / total
            say(f"{done:.0f}%: {speed}, ETA {time_left(left)}")
