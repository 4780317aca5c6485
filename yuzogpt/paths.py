"""Where relative paths lead: workers and submitted jobs run in other directories than the user.

In: a path as the user wrote it. Out: an absolute one, before Ray starts.
"""

import os
from pathlib import Path

from yuzogpt.errors import UserError

# Set by Ray for the entrypoint of `ray job submit`.
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def absolute(path: str, storage: str, key: str) -> Path:
    """Return `path` as an absolute local path; relative ones start at `storage`, if set.

    Raises UserError in a submitted job without `storage`: its working directory is an unpacked
    copy that vanishes with the job. `key` is the setting's name, for the message.
    """
    if not path:
        raise UserError(f"--{key}=: empty; give a path")
    base = Path(local_path(storage, "storage")) if storage else Path.cwd()
    if not base.is_absolute():
        raise UserError(f"--storage={storage}: not absolute; give a directory that all nodes share")
    plain = Path(local_path(path, key)).expanduser()
    if SUBMITTED_JOB in os.environ and not storage and not plain.is_absolute():
        raise UserError(
            f"--{key}={path}: relative, and a submitted job's directory vanishes with it; "
            "give an absolute path, or --storage=/a/directory/that/all/nodes/share"
        )
    return base / plain


def local_path(path: str, key: str) -> str:
    """Strip file://, and refuse the schemes of object stores, which are not supported yet."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return path
    if scheme == "file":
        return rest
    raise UserError(f"--{key}={path}: {scheme}:// is not supported; use a path or file://")
