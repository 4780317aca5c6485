"""What a run needs besides a corpus and weights: disk space, rights, services, enough rows.

In: settings with absolute paths. Out: nothing, or a UserError. Reads only; needs no torch.
"""

import importlib.util
import netrc
import os
import shutil
import socket
import urllib.parse
import urllib.request
from pathlib import Path

from yuzogpt import checkpoints
from yuzogpt.checkpoints.format import Checkpoint
from yuzogpt.checkpoints.pretrained import PUBLISHED
from yuzogpt.config import BatchSettings, LogSettings, RunSettings, TrainSettings
from yuzogpt.console.quantities import in_bytes
from yuzogpt.errors import UserError, reason_of
from yuzogpt.runtime.ranks import of_torchrun
from yuzogpt.storage.atomic_files import check_not_public, may
from yuzogpt.storage.filesystems import scheme_of
from yuzogpt.storage.paths import is_within, is_within_store

CONNECT_TIMEOUT_S = 5.0
OFFLINE = "or set WANDB_MODE=offline and send the records later, with `wandb sync`"


def check_world(batch: BatchSettings, workers: int, resume: Checkpoint | None) -> None:
    """Raise UserError if a global batch will be too small to give each worker a row.

    A batch that grows is never smaller again than at the step that a run resumes from.
    """
    least = batch.least_rows
    if resume:
        least = int(resume.state.batch.get("rows", batch.rows_at(resume.state.step)))
    if least < workers:
        flag = "batch_size" if least == batch.global_rows else "batch_start_rows"
        raise UserError(
            f"a global batch of {least} rows is too small for {workers} workers; raise --{flag}"
        )
    grows = batch.batch_schedule == "noise" and least < batch.global_rows
    if grows and least < 2 * workers:  # one gradient alone shows no noise
        raise UserError(
            f"batch_schedule=noise: {workers} workers need {2 * workers} rows to measure it; raise "
            f"--batch_start_rows={least}"
        )


def check_not_in_a_run(path: Path, flag: str) -> None:
    """Raise UserError if a path lies in the checkpoints of a run, which would delete it.

    `flag`: the flag and its value, for the message.
    """
    for folder in (Path(os.path.realpath(path)), *Path(os.path.realpath(path)).parents):
        if folder.name == "checkpoints" and (folder.parent / "settings.yaml").is_file():
            raise UserError(
                f"{flag}: lies in the checkpoints of {folder.parent}, which deletes files there; "
                "choose another"
            )


def check_writable(directory: Path, name: str, key: str = "out_dir") -> None:
    """Raise UserError if nothing can be written into a directory, which need not exist.

    `key`: the setting that names it.
    """
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir() or not may(existing, os.W_OK):
        reason = "not writable" if existing.is_dir() else "not a directory"
        raise UserError(f"--{key}={name}: {existing} is {reason}; choose another")


def check_start_is_kept(options: RunSettings) -> None:
    """Raise UserError if `--overwrite` would delete the model that `--init_from` names."""
    name, start = options.out_dir, options.init_from
    if not options.overwrite or start == "scratch" or start in PUBLISHED:
        return
    in_store = is_within_store(start, name)
    is_local = not scheme_of(start) and not scheme_of(name)
    if start == "resume" or in_store or (is_local and is_within(Path(start), Path(name))):
        raise UserError(
            f"--overwrite would delete what --init_from={start} starts from; choose another "
            "--out_dir"
        )


def check_space(settings: TrainSettings, run: Path) -> None:
    """Raise UserError if the checkpoints that are kept will not fit on the disk.

    A checkpoint is weights and two moments, and complete before an older one is deleted; of the
    best, weights are kept. For a run in an object store this machine holds one at a time.
    """
    existing = next(path for path in (run, *run.parents) if path.exists())
    kept, weights = settings.checkpoint, 4 * settings.model.matrix_weights
    often = settings.evaluation.eval_interval
    written = 1 + settings.schedule.max_iters // min(often, kept.checkpoint_interval or often)
    at_once = 3 * min(written, kept.keep_last + 1) + (written > kept.keep_last) * kept.keep_best
    free = shutil.disk_usage(existing).free
    if scheme_of(settings.run.out_dir):
        at_once = 3
    else:
        kept_now = (path for each in checkpoints.candidates(run) for path in each.iterdir())
        free += sum(path.stat().st_size for path in kept_now)
    if at_once * weights > free:
        raise UserError(
            f"--out_dir={settings.run.out_dir}: its checkpoints take "
            f"{in_bytes(at_once * weights)}, of {in_bytes(3 * weights)} each, {in_bytes(free)} are "
            f"free in {existing}; choose a larger disk, or a smaller --keep_last"
        )


def check_wandb(log: LogSettings) -> None:
    """Raise UserError if W&B is asked for and cannot work, on the rank that talks to it."""
    ranks = of_torchrun()
    if "wandb" not in log.all_loggers or (ranks and ranks.rank > 0):
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb_log: wandb is not installed; pip install 'yuzogpt[wandb]'")
    if log.wandb_key_file:
        check_not_public(Path(log.wandb_key_file), "wandb_key_file")
    import wandb

    known = wandb.setup().settings
    if known.mode in ("offline", "disabled", "dryrun"):
        return
    url = urllib.parse.urlsplit(known.base_url)
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    if not (log.wandb_key_file or known.api_key or known.identity_token_file or has_netrc(host)):
        raise UserError(f"--wandb_log: no key; `wandb login` or --wandb_key_file=FILE, {OFFLINE}")
    if url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return  # the proxy knows how to get there
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"--wandb_log: {host}:{port} is not within reach ({reason_of(error)}); {OFFLINE}"
        ) from None


def has_netrc(host: str) -> bool:
    """Return whether `wandb login` may have left a key for a host, or for W&B's older host."""
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            entries = netrc.netrc(file)
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError):
            return True  # wandb may know more
        if any(entries.authenticators(name) for name in (host, "api.wandb.ai")):
            return True
    return False
