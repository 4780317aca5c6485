"""Before the first step all ranks have the same settings, corpus and starting weights.

In: what each rank was given. Out: the same on all ranks, or a UserError on all of them that names
the difference. Settings are compared through torchrun's store, before there is a process group:
they decide what that is made of. Under Ray all ranks have one driver's.
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
from yuzogpt.config import TrainSettings
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.data.remote import open_anywhere
from yuzogpt.errors import UserError
from yuzogpt.evaluation.shards import weights_hash
from yuzogpt.runtime.world import World

# What may differ: places, of which the content is compared, and what is a node's own.
OF_NODE = {
    "data": {"dataset", "data_dir"},
    "run": {"out_dir", "storage"},
    "evaluation": {"benchmark_dir"},
    "log": {"wandb_log", "wandb_project", "wandb_run_name", "wandb_key_file"},
    "device": {"threads"},
    "workers": set(TrainSettings().workers.model_dump()),
}
NAMED = 3  # differences in a message
READ_WITHIN = timedelta(seconds=10)


def agree_on_settings(
    store: Store, world: World, settings: TrainSettings, mistake: str = ""
) -> None:
    """Raise UserError on all ranks if one has other settings, or found a mistake.

    `store`: in which nothing is written yet.
    """
    said = {"host": host(), "settings": compared(settings), "mistake": mistake}
    store.set(f"settings/{world.rank}", json.dumps(said))
    if world.rank == 0:
        of_ranks = [json.loads(store.get(f"settings/{rank}")) for rank in range(world.size)]
        store.set("verdict", difference(of_ranks))
    verdict = store.get("verdict").decode()
    if verdict:
        store.set(f"read/{world.rank}", "")
        if world.rank == 0:  # the store may be this process's
            with contextlib.suppress(DistStoreError):
                store.wait([f"read/{rank}" for rank in range(world.size)], READ_WITHIN)
        raise UserError(verdict)


def compared(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings that must be the same on all ranks, by section.leaf."""
    start = settings.run.init_from
    named = start in ("scratch", "resume", *PUBLISHED)
    found = settings.model_dump(mode="json", exclude={name: set(OF_NODE[name]) for name in OF_NODE})
    found["run"]["init_from"] = start if named else "a directory"
    return {f"{name}.{leaf}": value for name in found for leaf, value in found[name].items()}


def difference(of_ranks: list[dict[str, Any]]) -> str:
    """Return one line about the first rank that is not as rank 0; empty if all are."""
    first = of_ranks[0]
    for rank, own in enumerate(of_ranks):
        if own["mistake"]:
            return str(own["mistake"]) + (f" (rank {rank} on {own['host']})" if rank else "")
        keys = first["settings"].keys() | own["settings"].keys()
        pairs = {key: (first["settings"].get(key), own["settings"].get(key)) for key in keys}
        others = sorted(key for key, (expected, found) in pairs.items() if expected != found)
        if others:
            what = "; ".join(
                f"{key}: {pairs[key][0]} on rank 0 on {first['host']}, {pairs[key][1]} on rank "
                f"{rank} on {own['host']}"
                for key in others[:NAMED]
            )
            more = f"; and {len(others) - NAMED} more" if len(others) > NAMED else ""
            return f"ranks have other settings ({what}{more}); start all with the same command"
    return ""


def open_same_corpus(settings: TrainSettings, world: World) -> PreparedCorpus:
    """Open the corpus on every rank; UserError unless it is the same one on all."""
    for turn in (world.local_rank == 0, world.local_rank > 0):  # copied once a node
        with world.raise_on_all_ranks():
            if turn:
                corpus = open_anywhere(settings.data.data_dir)
    expected = world.broadcast((corpus.fingerprint, str(corpus.directory), host()))
    with world.raise_on_all_ranks():
        if corpus.fingerprint != expected[0]:
            raise UserError(
                f"rank {world.rank} on {host()} has another corpus in {corpus.directory} than rank "
                f"0 on {expected[2]} in {expected[1]}; copy one to all nodes, or prepare it again"
            )
    return corpus


def agree_on_start(settings: TrainSettings, world: World) -> Start | None:
    """Return the model that rank 0 found for `init_from`, on every rank; None: new weights.

    A run may get a better checkpoint while ranks look. UserError unless all have the same weights.
    """
    name = settings.run.init_from
    if name == "scratch":
        return None
    named: tuple[str, str] = ("", "")
    with world.raise_on_all_ranks():
        if world.rank == 0:
            reference = resolve_model(name)
            digest = "" if name in PUBLISHED else weights_hash(reference)  # a hash names those
            named = inside(name, reference), digest
    below, digest = world.broadcast(named)
    for turn in (world.local_rank == 0, world.local_rank > 0):  # fetched once a node
        with world.raise_on_all_ranks():
            if not turn:
                continue
            reference = resolve_model(name + below)
            is_dear = reference.checkpoint is None  # its files are hashed, once a node
            is_compared = digest and not (is_dear and world.local_rank > 0)
            if is_compared and weights_hash(reference) != digest:
                raise UserError(
                    f"rank {world.rank} on {host()} has other weights in {name}{below} than rank 0"
                )
    return Start(reference, digest)


def inside(name: str, reference: ModelReference) -> str:
    """Return where in a directory the checkpoint is that it stands for; empty: itself."""
    if reference.checkpoint is None:
        return ""
    storage = reference.checkpoint.storage
    return "" if storage.display_name == name else f"/checkpoints/{storage.name}"


def host() -> str:
    """Return the name of this machine."""
    return os.uname().nodename
