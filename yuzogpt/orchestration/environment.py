"""The variables that Ray reads from the environment, each with the reason for its value.

Most are read when ray is imported, so they are set before. What the user has set stays, except for
those of EMBEDDED_ALWAYS.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping

# Read from the user's environment.
ADDRESS = "RAY_ADDRESS"
AUTH_MODE = "RAY_AUTH_MODE"
JOB_STOP_WAIT_S = "RAY_JOB_STOP_WAIT_TIME_S"
# Set by functions of this file, or where their values are known.
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"  # of an embedded Ray; all its processes inherit it
TRAIN_CALLBACKS = "RAY_TRAIN_CALLBACKS"
# How long Ray waits for a worker that hangs: longer than our own watchdog.
TRAIN_HANG_TIMEOUT_S = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
# How long a stopped trial has for its end, before its process is killed.
TUNE_STOP_TIMEOUT_S = "TUNE_FUNCTION_THREAD_TIMEOUT_S"
# Names the function whose middlewares each of Serve's proxies puts around its app.
PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"

# Wherever Ray runs.
EVERYWHERE = {
    # A paragraph of advice for each worker that dies; we say so in a line. And that Serve's
    # controller, which ends itself, did not answer before it had ended.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing a task"
    "|ServeController.graceful_shutdown failed",
}
# A Ray that has one node and one command.
EMBEDDED = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no node drains here: a process of 3 s less
    "RAY_worker_niceness": "0",  # else Ray's own processes go before the work
    "RAY_prestart_worker_first_driver": "0",  # workers that nobody asks for
    # What is reported to a dashboard, and there is none; in milliseconds, as all that follow.
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
    "RAY_metrics_report_interval_ms": "600000",
    "RAY_task_events_report_interval_ms": "0",  # never
    "RAY_report_worker_backlog_interval_ms": "10000",
    # What is polled several times a second for the sake of other nodes, or of many tasks.
    "RAY_kill_idle_workers_interval_ms": "2000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_io_context_event_loop_lag_collection_interval_ms": "60000",
    "RAY_io_context_monitor_probe_interval_ms": "60000",
}
# The same, even if the user set something else for clusters. None: removed.
EMBEDDED_ALWAYS: dict[str, str | None] = {
    # Workers run in this command's environment as it is: started by `uv run`, Ray would make it for
    # each worker again, and a hook might give them another.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_RUNTIME_ENV_HOOK": None,
    # Nobody from elsewhere connects: without clusters, Ray listens on the loopback interface alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",  # its exporter listens on all interfaces
}
DATA = {
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # a failure is one line; Ray Data's own log has the rest
    # Memory is kept and used again, not returned: page faults cost more than tokenizing a little.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}
TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # the end is noticed soon, not after 4 s
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",  # workers that wait for a dead one never leave
}
# Time to find a place for all workers: when a node is lost, Ray asks for the old number first.
TRAIN_ELASTIC = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl has it all
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command; the same command resumes it
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",  # nobody reads Tune's own state
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of settings are absolute already
    "RAY_AIR_NEW_OUTPUT": "0",  # our table shows the trials
}
SERVE = {"RAY_SERVE_LOG_TO_STDERR": "0"}  # what the user must know is a line of ours


def set_defaults(*groups: Mapping[str, str]) -> None:
    """Set variables of this process that are not set yet."""
    for values in groups:
        for name, value in values.items():
            os.environ.setdefault(name, value)


def cluster_address(setting: str) -> str:
    """Return the address of the cluster that the user named; empty: none."""
    return setting or os.environ.get(ADDRESS, "")


def prepend_train_callbacks(paths: Iterable[str]) -> None:
    """Have Ray Train call these callbacks first, then the user's, then its own."""
    users = os.environ.get(TRAIN_CALLBACKS, "").split(",")
    os.environ[TRAIN_CALLBACKS] = ",".join(dict.fromkeys((*paths, *filter(None, users))))


@contextlib.contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of this process, and of those it starts; afterwards they are as before."""
    before = {name: os.environ.get(name) for name in values}
    set_variables(values)
    try:
        yield
    finally:
        set_variables(before)


def defaults_of(values: Mapping[str, str]) -> contextlib.AbstractContextManager[None]:
    """Set variables that are not set; afterwards they are as before."""
    return environment({name: os.environ.get(name, value) for name, value in values.items()})


def set_variables(values: Mapping[str, str | None]) -> None:
    """Set variables of this process; remove those whose value is None."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
