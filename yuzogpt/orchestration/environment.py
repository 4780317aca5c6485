"""The variables that Ray reads from the environment, each with the reason for its value."""

import contextlib
import os
from collections.abc import Iterator, Mapping

# Set before ray is imported, for a Ray that has one node and one command.
ONLY_HERE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no node drains here: a process of 3 s less
    "RAY_worker_niceness": "0",  # else Ray's own processes go before the work
    "RAY_prestart_worker_first_driver": "0",  # workers that nobody asks for
    # What is reported to a dashboard, and there is none; in milliseconds, as all that follow.
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
    "RAY_metrics_report_interval_ms": "600000",
    "RAY_task_events_report_interval_ms": "0",  # never
    "RAY_report_worker_backlog_interval_ms": "10000",
    # What is looked at several times a second for the sake of other nodes, or of many tasks.
    "RAY_kill_idle_workers_interval_ms": "2000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_io_context_event_loop_lag_collection_interval_ms": "60000",
    "RAY_io_context_monitor_probe_interval_ms": "60000",
}
# Set likewise, whatever the user set for clusters. None: removed.
NEVER_HERE: dict[str, str | None] = {
    # Workers run in this command's environment as it is: started by `uv run`, Ray would make it for
    # each worker again, and a hook might give them another.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_RUNTIME_ENV_HOOK": None,
    # Nobody from elsewhere connects: without clusters, Ray listens on the loopback interface alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",  # its exporter listens on all interfaces
}
# Set before ray is imported, wherever it runs.
QUIET = {
    # A paragraph of advice for each worker that dies; we say so in a line. And that Serve's
    # controller, which ends itself, did not answer before it had ended.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing a task"
    "|ServeController.graceful_shutdown failed",
}


@contextlib.contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of this process, and of those it starts; afterwards they are as before."""
    before = {name: os.environ.get(name) for name in values}
    set_variables(values)
    try:
        yield
    finally:
        set_variables(before)


def set_variables(values: Mapping[str, str | None]) -> None:
    """Set variables of this process; remove those whose value is None."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
