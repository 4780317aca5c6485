"""The cases of the hostile suite: a damaged copy of something, and a verb that reads it.

In: one of each that is whole: a corpus, a run, a Hugging Face folder. Out: cases: what was done to
a copy, and a command line.
"""

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.hostile import damage
from yuzogpt.storage.atomic_files import to_json

HERE = ["--num_workers=0", "--device=cpu"]
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Whole:
    """One of each that is right. Read only: cases change copies."""

    corpus: Path
    run: Path
    folder: Path  # of Hugging Face, in two files and an index
    train_flags: tuple[str, ...]  # with which the run was made, but for its places


@dataclass(frozen=True)
class Case:
    """A copy of `original`, which `change` damages, read by a command."""

    name: str
    original: Path
    change: Change
    verb: str
    command: Callable[[Path, Path], list[str]]  # of the copy, and of a folder to write in


def replace(name: str, content: bytes) -> Change:
    """Return what rewrites a file."""
    return lambda copy: set_content(copy / name, content)


def set_content(path: Path, content: bytes) -> None:
    """Write a file, whatever is there."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def become(name: str, kind: str) -> Change:
    """Return what puts something else where a file is."""

    def change(copy: Path) -> None:
        (copy / name).unlink()
        damage.NO_FILES[kind](copy / name)

    return change


def consistent(checkpoint: str, change: Change) -> Change:
    """Return a change after which the manifest has the right hashes: malice, not chance."""

    def both(copy: Path) -> None:
        change(copy)
        directory = copy / checkpoint
        manifest = json.loads((directory / "manifest.json").read_bytes())
        for name in manifest["files"]:
            if (directory / name).is_file():
                digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
                manifest["files"][name] = digest
        (directory / "manifest.json").write_bytes(to_json(manifest))

    return both


# --- tensors


def read_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def as_safetensors(header: Any, data: bytes) -> bytes:
    """Return a safetensors file with any header."""
    content = damage.encoded(header)
    return struct.pack("<Q", len(content)) + content + data


def tensor_variants(content: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield safetensors files that are whole and not those of the model, and some that are none."""
    header, data = read_safetensors(content)
    names = [name for name in header if name != "__metadata__"]
    one = rng.choice(names)
    entry = header[one]
    yield "NaN weights", as_safetensors(header, np.full(len(data) // 4, np.nan, "<f4").tobytes())
    yield "huge weights", as_safetensors(header, np.full(len(data) // 4, 3e38, "<f4").tobytes())
    yield "no tensors", as_safetensors({}, b"")
    yield "one missing", as_safetensors({k: v for k, v in header.items() if k != one}, data)
    yield "one more", as_safetensors({**header, "h.99999.x": entry}, data)
    yield (
        "other name",
        as_safetensors(
            {("../x" if name == one else name): value for name, value in header.items()}, data
        ),
    )
    for dtype in ("I64", "F64", "C64", "U16", "F8_E5M2", "BOOL", "F4", "no such"):
        yield f"{one} is {dtype}", as_safetensors({**header, one: {**entry, "dtype": dtype}}, data)
    for shape in ([], [1] * 100, [2**40, 2**40], [len(data)], entry["shape"][::-1], [-1]):
        yield (
            f"{one} has shape {str(shape)[:20]}",
            as_safetensors({**header, one: {**entry, "shape": shape}}, data),
        )
    yield "a header of 4 EiB", struct.pack("<Q", 2**62) + content[8:]
    for name, changed in damage.json_variants(json.dumps(header).encode(), rng, count):
        yield f"header: {name}", struct.pack("<Q", len(changed)) + changed + data
    yield from damage.bytes_variants(content, rng, count)


# --- blocks


def arrow_block(column: pa.Array, name: str = "tokens", batches: int = 1, **options: Any) -> bytes:
    """Return an Arrow IPC file of a column."""
    batch = pa.record_batch([column], names=[name])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def offsets_block(offsets: list[int], values: np.ndarray) -> bytes:
    """Return a block whose offsets are any numbers; Arrow makes it with others."""
    right = np.array([*range(len(offsets) - 1), len(values)], np.int32)
    content = arrow_block(pa.ListArray.from_arrays(pa.array(right), pa.array(values)))
    place = content.rfind(right.tobytes(), 0, content.index(values.tobytes()))
    wrong = np.array(offsets, np.int32).tobytes()
    return content[:place] + wrong + content[place + len(wrong) :]


def block_variants(content: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield blocks that are Arrow files and not what a corpus holds, and some that are no files."""
    batch = pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
    values = batch.column(0).values.to_numpy()
    end = len(values)
    for name, offsets in {
        "offsets beyond the end": [0, end + 1000],
        "offsets far beyond": [0, 2**31 - 1],
        "negative offsets": [-(2**31), end],
        "descending offsets": [0, end, 10, end],
        "not from 0 on": [5, end],
        "not to the end": [0, end - 5],
    }.items():
        yield name, offsets_block(offsets, values)
    yield "ids beyond the vocabulary", offsets_block([0, end], np.full(end, 65_535, np.uint16))
    yield "negative ids", offsets_block([0, end], np.full(end, -1, np.int16))
    yield "64 bits", offsets_block([0, end], values.astype(np.int64))
    yield "floats", offsets_block([0, end], values.astype(np.float32))
    yield "nulls", arrow_block(pa.array([None, values.tolist()], pa.list_(pa.uint16())))
    yield "null ids", arrow_block(pa.array([[None, *values.tolist()[1:]]], pa.list_(pa.uint16())))
    yield "text", arrow_block(pa.array(["text"]))
    yield "another name", arrow_block(batch.column(0), name="ids")
    yield "two batches", arrow_block(batch.column(0), batches=2)
    yield "no batch", arrow_block(batch.column(0), batches=0)
    yield "compressed", arrow_block(batch.column(0), compression="zstd")
    yield "large lists", arrow_block(batch.column(0).cast(pa.large_list(pa.uint16())))
    yield from damage.bytes_variants(content, rng, count)


def listed(block: str, content: bytes) -> Change:
    """Return what replaces a block and has the manifest list it, with its size and hash."""

    def change(copy: Path) -> None:
        (copy / block).write_bytes(content)
        manifest = json.loads((copy / "manifest.json").read_bytes())
        for entry in manifest["blocks"]:
            if entry["file"] == block:
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (copy / "manifest.json").write_bytes(to_json(manifest))

    return change


# --- commands


def commands_of_run(whole: Whole) -> dict[str, Callable[[Path, Path], list[str]]]:
    """Return the command lines that read a run or, but for resuming, a Hugging Face folder."""
    corpus = f"--data_dir={whole.corpus}"
    train = ["train", *whole.train_flags, corpus, *HERE]
    return {
        "sample": lambda run, _: [
            "sample", f"--init_from={run}", "--num_samples=1", "--max_new_tokens=4", "--device=cpu",
        ],
        "evaluate": lambda run, out: [
            "evaluate", str(run), "--tasks=loss", corpus, f"--out_dir={out / 'eval'}", *HERE,
        ],
        "finetune": lambda run, out: [
            *train, f"--init_from={run}", f"--out_dir={out / 'tuned'}", "--max_iters=1",
        ],
        "export": lambda run, out: ["export", str(run), "--to=huggingface", str(out / "hf")],
        "serve": lambda run, _: ["serve", str(run), "--num_replicas=0", "--port=0", "--device=cpu"],
        "resume": lambda run, _: [*train, f"--out_dir={run}", "--max_iters=5"],
        "report": lambda run, _: ["report", str(run), "--num_samples=1"],
    }  # fmt: skip


def commands_of_corpus(whole: Whole) -> dict[str, Callable[[Path, Path], list[str]]]:
    """Return the command lines that read a corpus."""
    train = ["train", *whole.train_flags, *HERE, "--max_iters=1"]
    return {
        "inspect": lambda corpus, _: ["inspect", str(corpus)],
        "train": lambda corpus, out: [
            *train, f"--data_dir={corpus}", f"--out_dir={out / 'run'}",
        ],
        "evaluate": lambda corpus, out: [
            "evaluate", str(whole.run), "--tasks=loss", f"--data_dir={corpus}",
            f"--out_dir={out / 'eval'}", *HERE,
        ],
    }  # fmt: skip


# --- cases


def cases(whole: Whole, seed: int, count: int, every: bool = False) -> Iterator[Case]:
    """Yield the cases of a seed: each variant by one verb in turn, or by `every` verb.

    `count`: random variants of each file.
    """
    rng = random.Random(seed)
    of_run, of_corpus = commands_of_run(whole), commands_of_corpus(whole)
    of_folder = {name: of_run[name] for name in ("sample", "finetune", "evaluate", "serve")}
    metrics = {name: of_run[name] for name in ("report", "resume", "serve")}
    metrics["report"] = lambda run, _: ["report", str(run), "--num_samples=0"]
    groups = [
        (whole.run, of_run, changes_of_checkpoint(whole.run, rng, count)),
        (whole.run, metrics, changes_of_metrics(whole.run, rng, count)),
        (whole.folder, of_folder, changes_of_folder(whole.folder, rng, count)),
        (whole.corpus, of_corpus, changes_of_corpus(whole.corpus, rng, count)),
    ]
    for original, commands, changes in groups:
        verbs = list(commands)
        for index, (name, change) in enumerate(changes):
            for verb in verbs if every else [verbs[index % len(verbs)]]:
                yield Case(name, original, change, verb, commands[verb])


def changes_of_checkpoint(
    run: Path, rng: random.Random, count: int
) -> Iterator[tuple[str, Change]]:
    """Yield what is done to the only checkpoint of a run, by chance and by malice."""
    (directory,) = (run / "checkpoints").glob("step-*")
    checkpoint = directory.relative_to(run).as_posix()
    for file in ("manifest.json", "state.json", "tokenizer.json"):
        content = (directory / file).read_bytes()
        for name, changed in damage.json_variants(content, rng, count):
            change = replace(f"{checkpoint}/{file}", changed)
            yield f"{file}: {name}", consistent_unless(file, checkpoint, change)
    for name, changed in tensor_variants(
        (directory / "model.safetensors").read_bytes(), rng, count
    ):
        change = replace(f"{checkpoint}/model.safetensors", changed)
        yield f"model: {name}", consistent(checkpoint, change)
    content = (directory / "optimizer.safetensors").read_bytes()
    for name, changed in tensor_variants(content, rng, count // 4):
        change = replace(f"{checkpoint}/optimizer.safetensors", changed)
        yield f"optimizer: {name}", consistent(checkpoint, change)
    for file in ("manifest.json", "state.json", "tokenizer.json", "model.safetensors"):
        for kind in damage.NO_FILES:
            yield f"{file} is {kind}", become(f"{checkpoint}/{file}", kind)


def consistent_unless(file: str, checkpoint: str, change: Change) -> Change:
    """Return a change with a manifest that fits, unless the manifest is what changes."""
    return change if file == "manifest.json" else consistent(checkpoint, change)


def changes_of_metrics(run: Path, rng: random.Random, count: int) -> Iterator[tuple[str, Change]]:
    """Yield what is done to metrics.jsonl and its neighbours."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    whole = b"".join(lines)
    by_kind = {json.loads(line)["kind"]: index for index, line in enumerate(lines)}
    for kind, index in by_kind.items():
        for name, changed in damage.json_variants(lines[index].strip(), rng, count):
            content = b"".join([*lines[:index], changed + b"\n", *lines[index + 1 :]])
            yield f"metrics.jsonl, {kind}: {name}", replace("metrics.jsonl", content)
    yield "metrics.jsonl: no end of line", replace("metrics.jsonl", whole + b"x" * 50_000_000)
    for file in ("metrics.jsonl", "settings.yaml"):
        for kind in damage.NO_FILES:
            yield f"{file} is {kind}", become(file, kind)
    yield "settings.yaml: bombs", replace("settings.yaml", b"a: &a [x]\nb: &b [*a, *a]\n")


def changes_of_folder(folder: Path, rng: random.Random, count: int) -> Iterator[tuple[str, Change]]:
    """Yield what is done to a Hugging Face folder."""
    files = ("config.json", "model.safetensors.index.json", "tokenizer.json")
    for file in files:
        content = (folder / file).read_bytes()
        for name, changed in damage.json_variants(content, rng, count):
            yield f"{file}: {name}", replace(file, changed)
        for kind in damage.NO_FILES:
            yield f"{file} is {kind}", become(file, kind)
    config = json.loads((folder / "config.json").read_bytes())
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        for value in (0, 100_000, 2**31, 2**70, -1, 1.5, "12", None):
            content = damage.encoded({**config, key: value})
            yield f"config.json: {key}={value}", replace("config.json", content)
    (weights, *_) = sorted(path.name for path in folder.glob("model-*.safetensors"))
    for name, changed in tensor_variants((folder / weights).read_bytes(), rng, count):
        yield f"{weights}: {name}", replace(weights, changed)


def changes_of_corpus(corpus: Path, rng: random.Random, count: int) -> Iterator[tuple[str, Change]]:
    """Yield what is done to a corpus."""
    for file in ("manifest.json", "tokenizer.json"):
        content = (corpus / file).read_bytes()
        for name, changed in damage.json_variants(content, rng, count):
            yield f"{file}: {name}", replace(file, changed)
    for file in ("manifest.json", "tokenizer.json", "train-00000.arrow", "val-00000.arrow"):
        for kind in damage.NO_FILES:
            yield f"{file} is {kind}", become(file, kind)
    for block in ("train-00000.arrow", "val-00000.arrow"):
        content = (corpus / block).read_bytes()
        for name, changed in block_variants(content, rng, count):
            yield f"{block}: {name}", listed(block, changed)


def copy_of(original: Path, place: Path) -> Path:
    """Copy a tree to a new place."""
    shutil.copytree(original, place)
    return place
