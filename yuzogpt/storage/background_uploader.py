"""Uploads a file that grows, such as metrics.jsonl, while it is written."""

import contextlib
import threading
import time

from yuzogpt.storage.run_storage import RunStorage, version_of

SYNC_INTERVAL_S = 2.0  # between uploads of a growing file, and between polls of the store
MAX_SYNC_TIME_SHARE = 0.05  # of the time, that such uploads and polls may take


class BackgroundUploader:
    """Uploads a growing file every few seconds; does nothing without a store."""

    def __init__(self, file: RunStorage) -> None:
        """Begin at once."""
        self.file, self.uploaded = file, (-1, -1)
        self.lock = threading.Lock()  # an older copy must not come after a newer one
        self.wake, self.done = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        if file.is_remote:
            self.wake.set()
            self.thread.start()

    def upload(self) -> None:
        """Upload the file now, if it has changed; OSError if that fails."""
        if not self.file.is_remote:
            return
        with self.lock:
            version = version_of(self.file.local)
            if version != self.uploaded:
                self.file.upload()
                self.uploaded = version

    def upload_soon(self) -> None:
        """Have the thread upload the file without waiting for its next turn."""
        self.wake.set()

    def close(self) -> None:
        """Upload what is left; OSError if that fails."""
        self.done.set()
        self.wake.set()
        if self.thread.is_alive():
            self.thread.join()
        self.upload()

    def _run(self) -> None:
        pause = 0.0
        while not self.done.is_set():
            self.wake.wait(pause)
            self.wake.clear()
            started = time.monotonic()
            with contextlib.suppress(OSError):  # tried again
                self.upload()
            pause = pause_after(time.monotonic() - started)


def pause_after(seconds: float) -> float:
    """Return how long to wait after an upload or a poll that took so many seconds."""
    return max(SYNC_INTERVAL_S, seconds / MAX_SYNC_TIME_SHARE)
