"""Why something failed on Ray: its innermost cause, without wrapping, tracebacks and advice."""

import pytest
from ray import cloudpickle
from ray.data._internal.util import _annotate_exception_with_retry_context
from ray.data.exceptions import SystemException
from ray.exceptions import (
    ActorDiedError,
    OutOfMemoryError,
    RayTaskError,
    UserCodeException,
    WorkerCrashedError,
)
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)

from yuzogpt.errors import RunFailed, UserError
from yuzogpt.orchestration.causes import as_our_error, cause_of, how_to_resume, raised_as_ours
from yuzogpt.storage.untrusted import DamagedFile


def in_task(error: Exception) -> Exception:
    """Return what `ray.get` raises for a task that raised `error`."""
    wrapped = RayTaskError("f", f"Traceback\n  File 'f.py'\n{error!r}", error, ip="127.0.0.1")
    got: Exception = cloudpickle.loads(cloudpickle.dumps(wrapped)).as_instanceof_cause()
    return got


def in_ray_data(error: Exception) -> Exception:
    """Return what Ray Data raises for a task that raised `error`: with advice, and a mark."""
    advised = _annotate_exception_with_retry_context(
        error,
        description="apply UDF transform",
        attempts=1,
        max_attempts=1,
        total_backoff_s=0,
        exception_str=str(error),
    )
    raised = in_task(advised)  # type: ignore[arg-type]
    raised.__cause__ = SystemException()
    return raised


def caused_by(error: Exception, cause: BaseException) -> Exception:
    """Return an error that was raised from another one."""
    error.__cause__ = cause
    return error


LOST = ActorDiedError(
    RayTaskError("__init__", "Traceback", ValueError("bad shape\nand more"), ip="127.0.0.1")
)

SERVES = """Deploying application yuzogpt failed: see the controller's logs. Error:
Traceback (most recent call last):
  File "a.py", line 1, in f
    g()
  File "b.py", line 2, in g
    raise X
    ^^^^^^^
yuzogpt.somewhere.Broken: no model
help: none
"""


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (in_task(ValueError("bad row\nmore")), "ValueError: bad row"),
        (in_ray_data(ValueError("bad row\nmore")), "ValueError: bad row"),
        (in_ray_data(OSError(28, "No space left on device")), "OSError: No space left on device"),
        (in_task(KeyError()), "KeyError"),
        (in_ray_data(DamagedFile("a.parquet: damaged")), "a.parquet: damaged"),
        (in_task(in_task(RunFailed("no disk"))), "no disk"),
        (caused_by(UserCodeException("UDF"), ZeroDivisionError("by 0")), "ZeroDivisionError: by 0"),
        (caused_by(RunFailed("ours"), ZeroDivisionError("by 0")), "ours"),
        (LOST, "ValueError: bad shape"),
        (ControllerError(in_task(KeyError("x"))), "KeyError: 'x'"),
        (
            WorkerGroupError(
                "all",
                {
                    0: RuntimeError("gloo: connection closed"),
                    1: WorkerHealthCheckFailedError("failed", LOST),
                },
            ),
            "ValueError: bad shape",
        ),
        (UserExceptionWithTraceback(ValueError("in a loop"), "Traceback"), "ValueError: in a loop"),
        (
            WorkerCrashedError(),
            "The worker died unexpectedly while executing this task",
        ),
        (
            OutOfMemoryError(
                "Task was killed: the node is low on memory. Memory: 1 GB.\nRefer to x"
            ),
            "Task was killed: the node is low on memory",
        ),
        (
            RuntimeError(SERVES),
            "Broken: no model",
        ),
    ],
)
def test_the_innermost_cause_is_one_line(error, cause):
    assert cause_of(error) == cause


def test_the_file_that_an_error_is_about_is_told():
    assert cause_of(FileNotFoundError(2, "x", "/d/a.txt")) == (
        "FileNotFoundError: /d/a.txt: No such file or directory"
    )


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (in_task(ValueError("bad row")), ""),
        (in_task(OSError(28, "full")), "; fix that, and the same command resumes it"),
        (in_task(ConnectionResetError(104, "reset")), "; the same command resumes it"),
        (WorkerCrashedError(), "; the same command resumes it"),
        (RuntimeError("gloo/transport/tcp/pair.cc: closed"), "; the same command resumes it"),
        (LOST, ""),
    ],
)
def test_only_what_would_not_fail_again_is_to_be_repeated(error, end):
    assert how_to_resume(error) == end


@pytest.mark.parametrize("kind", [UserError, RunFailed])
def test_errors_of_ours_come_through_as_themselves(kind):
    with pytest.raises(kind, match=r"^a\.txt: not found$"), raised_as_ours("preparation"):
        raise in_ray_data(kind("a.txt: not found"))


def test_others_are_told_with_what_failed():
    error = as_our_error(in_ray_data(TypeError("no text")), "preparation")
    assert type(error) is RunFailed
    assert str(error) == "the preparation failed: TypeError: no text"
