"""Why something failed on Ray, in one line: the same for every command.

Ray wraps the exception of a task, an actor or a training worker, and puts tracebacks and advice
into its text. Here the innermost cause is found; our own errors stay what they are.
"""

import contextlib
from collections.abc import Iterator, Mapping

from yuzogpt.errors import RunFailed, UserError, first_line, reason_of
from yuzogpt.orchestration.ray_internals import is_lost_worker

OURS = (UserError, RunFailed)
# Attributes in which exceptions of Ray, Ray Train and Ray Data hold the one that they wrap.
WRAPPED = ("cause", "controller_failure", "health_check_failure", "_base_exc")
ADVICE = "Failed to "  # begins what Ray Data appends to an exception's arguments
# In messages of torch's about a worker that it no longer reaches: it died, or the network did.
LOST_PEER = ("gloo", "NCCL", "Connection")


def cause_of(error: BaseException) -> str:
    """Return the type and the first line of the innermost cause; of Ray's own, a sentence."""
    inner = innermost(error)
    if isinstance(inner, OURS):
        return first_line(inner)
    if is_ray_error(inner):
        return ray_sentence(inner)
    text = from_traceback(str(inner))
    if text:
        return text
    if isinstance(inner, OSError):
        return f"{type(inner).__name__}: {file_of(inner)}{reason_of(inner)}"
    return ": ".join(dict.fromkeys((type(inner).__name__, first_line(inner))))


def innermost(error: BaseException) -> BaseException:
    """Return the exception that the others wrap, or an error of ours before what caused it."""
    seen = {id(error)}
    while (inner := inside(error)) is not None and id(inner) not in seen:
        seen.add(id(inner))
        error = inner
    return error


def inside(error: BaseException) -> BaseException | None:
    """Return what an exception wraps."""
    for name in WRAPPED:
        wrapped = getattr(error, name, None)
        if isinstance(wrapped, BaseException):
            return wrapped
    if isinstance(error, OURS):
        return None
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, Mapping) and failures:
        return first_to_fail(failures)[1]
    if is_ray_error(error) and error.args and isinstance(error.args[0], BaseException):
        return error.args[0]  # an actor that failed in its constructor
    cause = error.__cause__
    return (
        cause if cause and (str(cause) or not is_ray_error(cause)) else None
    )  # Ray Data marks some so


def first_to_fail(errors: Mapping[int, Exception]) -> tuple[int, Exception]:
    """Return the worker that is to blame: one that is gone, rather than those that missed it."""
    gone = {rank: error for rank, error in errors.items() if is_lost_worker(error)}
    return min((gone or errors).items(), key=lambda item: item[0])


def is_ray_error(error: BaseException) -> bool:
    """Return whether Ray itself raised an exception, because a process or a node died, say."""
    return type(error).__module__.partition(".")[0] == "ray"


def ray_sentence(error: BaseException) -> str:
    """Return the sentence of one of Ray's messages that says what happened.

    The others say where, and which of Ray's variables to set.
    """
    from ray.exceptions import RayActorError

    text = str(error)
    if cause := from_traceback(text):
        return cause
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Worker info: ", "Set the RAY_"))]
    if not lines:
        return type(error).__name__
    # Of an actor, the last line says why; those before, which one it was.
    line = lines[-1] if isinstance(error, RayActorError) else lines[0]
    return line.split(". ")[0].removesuffix(".")


def from_traceback(text: str) -> str | None:
    """Return the type and the first line of the exception at the end of a traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    if not frames:
        return None
    after = (line for line in lines[frames[-1] + 1 :] if not line.startswith(" "))
    name, colon, message = next(after, "").partition(":")
    return name.rpartition(".")[2] + colon + message or None


def file_of(error: OSError) -> str:
    """Return which file an error is about, as the beginning of a message."""
    name = error.filename
    if not isinstance(name, str | bytes) or str(name).startswith(ADVICE):
        return ""
    return f"{name if isinstance(name, str) else name.decode(errors='replace')}: "


def how_to_resume(error: BaseException) -> str:
    """Return the end of a message: how to resume, unless the same command would fail again."""
    inner = innermost(error)
    text = str(inner)
    if is_ray_error(inner) or isinstance(inner, ConnectionError | TimeoutError):
        return "" if from_traceback(text) else "; the same command resumes it"
    if isinstance(inner, OSError):
        return "; fix that, and the same command resumes it"
    is_lost_peer = isinstance(inner, RuntimeError) and any(word in text for word in LOST_PEER)
    return "; the same command resumes it" if is_lost_peer else ""


def as_our_error(error: BaseException, what: str, more: str = "") -> Exception:
    """Return what to raise for an error of Ray's: one of ours inside of it, else RunFailed.

    `more`: of the message, before its end.
    """
    inner = innermost(error)
    for kind in OURS:
        if isinstance(inner, kind):
            return kind(first_line(inner))  # Ray adds lines of advice
    return RunFailed(f"the {what} failed: {cause_of(error)}{more}{how_to_resume(error)}")


@contextlib.contextmanager
def raised_as_ours(what: str, kind: type[Exception] | None = None) -> Iterator[None]:
    """Raise UserError or RunFailed for exceptions of a kind; None: for Ray's."""
    from ray.exceptions import RayError

    caught = kind or RayError
    try:
        yield
    except caught as error:
        raise as_our_error(error, what) from error
