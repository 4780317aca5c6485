"""Checks before the first step that all ranks have the same settings, corpus and weights.

If they differ, a UserError on all ranks names the difference. Settings are compared through
torchrun's store before there is a process group, since the group depends on them. Under Ray, all
ranks get the driver's settings.
"""

import contextlib
import json
import os
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import Store

from yuzogpt.checkpoints.load import Start
from yuzogpt.checkpoints.pretrained import PUBLISHED
from yuzogpt.checkpoints.resolve import ModelReference, resolve_model
from yuzogpt.config import DataSettings, TrainSettings
from yuzogpt.console.terminal import say_while_waiting
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.data.remote import open_anywhere
from yuzogpt.errors import UserError
from yuzogpt.evaluation.shards import weights_hash
from yuzogpt.runtime.world import World

# These may differ: paths, whose content is compared, and what belongs to a node.
NODE_SETTINGS = {
    "data": {"dataset", "data_dir"},
    "run": {"out_dir", "storage"},
    "evaluation": {"benchmark_dir"},
    "log": {"loggers", "wandb_log", "wandb_project", "wandb_run_name", "wandb_key_file"},
    "device": {"threads"},
    "workers": set(TrainSettings().workers.model_dump()),
}
MAX_DIFFERENCES_SHOWN = 3
READ_TIMEOUT = timedelta(seconds=10)


def agree_on_settings(
    store: Store, world: World, settings: TrainSettings, mistake: str = ""
) -> None:
    """Raise UserError on all ranks if one has other settings, or passes a `mistake`.

    Nothing may be written in `store` yet.
    """
    own = {"host": hostname(), "settings": shared_settings(settings), "mistake": mistake}
    store.set(f"settings/{world.rank}", json.dumps(own))
    if world.rank == 0:
        by_rank = [json.loads(store.get(f"settings/{rank}")) for rank in range(world.size)]
        store.set("verdict", describe_difference(by_rank))
    verdict = store.get("verdict").decode()
    if verdict:
        store.set(f"read/{world.rank}", "")
        if world.rank == 0:  # the store may live in this process
            with contextlib.suppress(DistStoreError):
                store.wait([f"read/{rank}" for rank in range(world.size)], READ_TIMEOUT)
        raise UserError(verdict)


def shared_settings(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings that must be the same on all ranks, by section.leaf."""
    start = settings.run.init_from
    is_name = start in ("scratch", "resume", *PUBLISHED)
    sections = settings.model_dump(mode="json", exclude=NODE_SETTINGS)
    sections["run"]["init_from"] = start if is_name else "a directory"
    return {f"{name}.{leaf}": value for name in sections for leaf, value in sections[name].items()}


def describe_difference(by_rank: list[dict[str, Any]]) -> str:
    """Return one line about the first rank that differs from rank 0; empty if none does."""
    first = by_rank[0]
    for rank, own in enumerate(by_rank):
        if own["mistake"]:
            return str(own["mistake"]) + (f" (rank {rank} on {own['host']})" if rank else "")
        keys = first["settings"].keys() | own["settings"].keys()
        pairs = {key: (first["settings"].get(key), own["settings"].get(key)) for key in keys}
        different = sorted(key for key, (expected, actual) in pairs.items() if expected != actual)
        if different:
            what = "; ".join(
                f"{key}: {pairs[key][0]} on rank 0 on {first['host']}, {pairs[key][1]} on rank "
                f"{rank} on {own['host']}"
                for key in different[:MAX_DIFFERENCES_SHOWN]
            )
            more = (
                f"; and {len(different) - MAX_DIFFERENCES_SHOWN} more"
                if len(different) > MAX_DIFFERENCES_SHOWN
                else ""
            )
            return f"ranks have other settings ({what}{more}); start all with the same command"
    return ""


def open_same_corpus(data: DataSettings, world: World) -> PreparedCorpus:
    """Open the corpus on every rank; UserError unless all have the same one."""
    for turn in (world.local_rank == 0, world.local_rank > 0):  # copied once per node
        with world.raise_on_all_ranks():
            if turn:
                corpus = open_anywhere(data.data_dir)
    expected = world.broadcast((corpus.fingerprint, str(corpus.directory), hostname()))
    with world.raise_on_all_ranks():
        if corpus.fingerprint != expected[0]:
            raise UserError(
                f"rank {world.rank} on {hostname()} has another corpus in {corpus.directory} than "
                f"rank 0 on {expected[2]} in {expected[1]}; copy one to all nodes, "
                "or prepare it again"
            )
    return corpus


def agree_on_start(name: str, world: World) -> Start | None:
    """Return rank 0's choice of the model for `init_from=name`, on every rank; None: new weights.

    A run may get a better checkpoint while ranks look it up. UserError unless all ranks have the
    same weights.
    """
    if name == "scratch":
        return None
    choice: tuple[str, str] = ("", "")
    with world.raise_on_all_ranks():
        if world.rank == 0:
            say_while_waiting(f"loading model {name} ...")
            reference = resolve_model(name)
            digest = "" if name in PUBLISHED else weights_hash(reference)  # these have fixed hashes
            choice = path_within(name, reference), digest
    below, digest = world.broadcast(choice)
    for turn in (world.local_rank == 0, world.local_rank > 0):  # fetched once per node
        with world.raise_on_all_ranks():
            if not turn:
                continue
            reference = resolve_model(name + below)
            is_slow = reference.checkpoint is None  # its files must be hashed: once per node
            is_compared = digest and not (is_slow and world.local_rank > 0)
            if is_compared and weights_hash(reference) != digest:
                raise UserError(
                    f"rank {world.rank} on {hostname()} has other weights in {name}{below} than "
                    "rank 0"
                )
    return Start(reference, digest)


def path_within(name: str, reference: ModelReference) -> str:
    """Return the path of the checkpoint within directory `name`; empty if they are the same."""
    if reference.checkpoint is None:
        return ""
    storage = reference.checkpoint.storage
    return "" if storage.display_name == name else f"/checkpoints/{storage.name}"


def hostname() -> str:
    """Return the name of this machine."""
    return os.uname().nodename
