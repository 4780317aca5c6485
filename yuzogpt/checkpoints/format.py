"""Checkpoints: one directory each, whole and verified, or not there. Knows no loop and no ranks.

In: tensors and the state of a run. Out: `out_dir/checkpoints/step-N/` with

    model.safetensors        the weights; written by several ranks: model-0000k-of-0000n.safetensors
                             and model.safetensors.index.json, as Hugging Face names them
    optimizer.safetensors    the optimizer's state, in its own file: readers of weights do not need
                             it, and it is deleted from checkpoints that no run resumes from
    tokenizer.json           so that sampling needs nothing else
    state.json               rows_seen, step, settings, dataset fingerprint, metrics
    manifest.json            the SHA-256 of each; written last. And what is measured later: the
                             validation loss

Tensors are whole in every file, so a checkpoint does not depend on how many ranks wrote it. It is
written under another name, synced, verified, then renamed. The directory is the only truth: which
checkpoint is newest or best is read off the files in it. remote.py does the same in an object
store.
"""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field

from yuzogpt.checkpoints.safetensors_file import read_tensors
from yuzogpt.config.renamed import with_current_names
from yuzogpt.errors import UserError
from yuzogpt.storage.atomic_files import sha256, sync_directory, sync_file, to_json, write_durably
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.storage.untrusted import DamagedFile, Sha256, Untrusted, read_json

if TYPE_CHECKING:  # torch takes seconds to import; errors of the user's are found before that
    from torch import Tensor

MODEL, OPTIMIZER = "model", "optimizer"  # the two kinds of tensor files
TOKENIZER = "tokenizer.json"
STATE = "state.json"
MANIFEST = "manifest.json"
METRICS = "metrics"  # in the manifest: what was measured after the checkpoint was written
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 had no files of several ranks


Setting = TypeVar("Setting", str, int)

# The names that we write. Other names, in a manifest of somebody else's, are never opened.
FileName = Annotated[
    str,
    Field(
        pattern=r"^((model|optimizer)(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?"
        r"|tokenizer\.json|state\.json)$"
    ),
]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(gt=-(2**63), lt=2**63)] | float


class CorruptCheckpoint(Exception):
    """A directory that looks like a checkpoint, but is damaged or incomplete."""


class Manifest(Untrusted):
    """The content of manifest.json."""

    format: int
    files: dict[FileName, Sha256]
    metrics: dict[str, Number] = Field(default_factory=dict)  # measured later


DtypeName = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Arithmetic:
    """How a run on CPUs computes."""

    dtype: DtypeName  # of autocast
    attention: Literal["explicit", "fused"]
    machine: Annotated[str, Field(max_length=200)]  # the CPU that it was chosen on


@dataclass(frozen=True)
class State:
    """The state of a run, apart from its tensors."""

    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")

    step: Whole
    rows_seen: Whole
    settings: Annotated[dict[str, dict[str, Any]], AfterValidator(with_current_names)]
    dataset: str
    tokenizer: str
    metrics: dict[str, Number]
    guard: dict[str, Number] = field(default_factory=dict)  # the state of the guards
    batch: dict[str, Number] = field(default_factory=dict)  # measured by the batch schedule
    arithmetic: Arithmetic | None = None  # None on GPUs


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified."""

    storage: RunStorage
    state: State

    @property
    def directory(self) -> Path:
        """The directory of its files on this machine."""
        return self.storage.local

    def tensors(self, kind: str) -> "Iterator[tuple[str, Tensor]]":
        """Yield the tensors of MODEL or OPTIMIZER with their names, whole, memory-mapped."""
        for name in sorted(read_manifest(self.directory).files):
            if name.startswith(kind) and name.endswith(".safetensors"):
                yield from read_tensors(self.directory / name)

    def setting(self, section: str, leaf: str, kind: type[Setting]) -> Setting:
        """Return a setting of its run; UserError if there is none of that type."""
        value = self.state.settings.get(section, {}).get(leaf)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{self.directory / STATE}: settings.{section}.{leaf}: not a {kind.__name__}"
            )
        return value


def tensor_file(kind: str, part: int, parts: int) -> str:
    """Return the name of the file that holds part `part` (from 0) of the tensors of a kind."""
    number = "" if parts == 1 else f"-{part + 1:05}-of-{parts:05}"
    return f"{kind}{number}.safetensors"


def begin(run: RunStorage, step: int) -> RunStorage:
    """Return a new directory for the tensor files of a checkpoint; `commit` renames it.

    A checkpoint of the same step that is in a store is deleted, because nothing can be renamed
    there.
    """
    (run / "checkpoints" / f"step-{step}").delete_remote(first=MANIFEST)
    temporary = run / "checkpoints" / f".step-{step}.{uuid.uuid4().hex}.tmp"
    temporary.local.mkdir(parents=True)
    return temporary


def commit(
    temporary: RunStorage,
    state: State,
    tokenizer: bytes,
    hashes: Mapping[str, str],
    contents: Mapping[str, list[str]],
) -> Checkpoint:
    """Make a checkpoint of the tensor files in `temporary`: add the rest, verify, rename.

    The files are synced. `hashes`: their SHA-256; `contents`: the tensors in each.
    CorruptCheckpoint if the disk returns other bytes: then no checkpoint has been made. Those of a
    run in a store were verified when they were uploaded; `remote.publish` comes next.
    """
    folder = temporary.local
    small = {TOKENIZER: tokenizer, STATE: to_json(asdict(state)), **index_files(contents)}
    for name, content in small.items():
        (folder / name).write_bytes(content)
        sync_file(folder / name)
    hashes = {**hashes, **{name: sha256(folder / name) for name in small}}
    manifest = {"format": FORMAT_VERSION, "files": hashes}
    (folder / MANIFEST).write_bytes(to_json(manifest))
    sync_file(folder / MANIFEST)
    sync_directory(folder)
    written = verify(temporary, head_only=temporary.is_remote)
    final = temporary.parent / f"step-{state.step}"
    remove(final.local)
    folder.rename(final.local)
    sync_directory(final.local.parent)
    return replace(written, storage=final)


def index_files(contents: Mapping[str, list[str]]) -> dict[str, bytes]:
    """Return the index of each kind that is in several files: which tensor is in which."""
    indices = {}
    for kind in (MODEL, OPTIMIZER):
        files = [name for name in contents if name.startswith(f"{kind}-")]
        if files:
            weight_map = {tensor: name for name in files for tensor in contents[name]}
            content = {"metadata": {}, "weight_map": weight_map}
            indices[f"{kind}.safetensors.index.json"] = to_json(content)
    return indices


def verify(storage: RunStorage, *, optimizer: bool = True, head_only: bool = False) -> Checkpoint:
    """Compare the files of a checkpoint with its manifest; CorruptCheckpoint says what is wrong.

    `optimizer`: False if the reader does not need its tensors; `head_only`: compare the state
    alone. Files that are missing here are downloaded from the store. UserError if another version
    wrote it, or if it may not be read: such a checkpoint is not corrupt.
    """
    directory = storage.local
    try:
        manifest = read_manifest(directory)
        if manifest.format not in READABLE_VERSIONS:
            raise UserError(
                f"{directory}: format {manifest.format}, written by another version of "
                f"YuzoGPT; this one reads {', '.join(map(str, READABLE_VERSIONS))}"
            )
        if STATE not in manifest.files:
            raise CorruptCheckpoint(f"{MANIFEST} does not name {STATE}")
        for name, expected in manifest.files.items():
            if (name.startswith(OPTIMIZER) and not optimizer) or (head_only and name != STATE):
                continue
            if not is_whole(storage / name, expected):
                raise CorruptCheckpoint(f"{name} does not have the SHA-256 of the manifest")
        return read(storage)
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{Path(error.filename).name} is missing") from None
    except DamagedFile as error:
        raise CorruptCheckpoint(str(error).removeprefix(f"{directory}/")) from None
    except OSError as error:
        if storage.is_remote:  # it may be within reach again soon
            raise
        raise UserError(f"{directory}: not readable: {error.strerror}") from None


def is_whole(file: RunStorage, expected: str) -> bool:
    """Compare a file with its SHA-256; download it if it is missing here, or different."""
    if not file.local.exists():
        file.download()
    return sha256(file.local) == expected or (file.download() and sha256(file.local) == expected)


def read(storage: RunStorage) -> Checkpoint:
    """Read the state of a checkpoint that this process or another has verified."""
    return Checkpoint(storage, read_state(storage.local))


def read_state(directory: Path) -> State:
    """Return the state of a checkpoint, with the metrics of its manifest."""
    state = read_json(directory / STATE, State)
    return replace(state, metrics={**state.metrics, **read_manifest(directory).metrics})


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a checkpoint; DamagedFile if it is none of ours."""
    return read_json(directory / MANIFEST, Manifest)


def add_metrics(storage: RunStorage, metrics: Mapping[str, float]) -> None:
    """Add metrics that were measured later to a checkpoint: to its manifest, in one write."""
    manifest = read_manifest(storage.local)
    rewrite_manifest(storage, manifest.model_copy(update={METRICS: dict(metrics)}))


def rewrite_manifest(storage: RunStorage, manifest: Manifest) -> None:
    """Replace the manifest of a checkpoint, here and in its store."""
    file = storage / MANIFEST
    write_durably(file.local, to_json(manifest.model_dump(exclude_unset=True)))
    file.upload()


def remove(directory: Path) -> None:
    """Delete a directory here so that half of it is never mistaken for a checkpoint."""
    if directory.exists():
        doomed = directory.with_name(f".{directory.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)
