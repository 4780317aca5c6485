"""Preparation against the tokenizer alone and against nanoGPT's way, on the same files.

    python benchmarks/preparation.py SOURCE [--copies=10] [--pairs=5] [--workers=2]
    python benchmarks/preparation.py --memory

SOURCE: a folder of parquet with a column `text`. Its files are copied `copies` times (`prepare`
reads each real file once, so links would not do). The three sides run in turn, each as a process of
its own, and the medians are compared:

    yuzogpt    `yuzogpt prepare openwebtext`, from the source to the manifest; only ray.init apart
    tiktoken   tiktoken's own GPT-2 encoding, `encode_to_numpy`, in a pool of processes, and
               nothing else: no writing, no hashing
    nanogpt    what nanoGPT's data/openwebtext/prepare.py does once the dataset is loaded:
               `datasets.map` with num_proc, then a memmap (pip install datasets)

--memory: the peak of resident memory of `yuzogpt prepare --num_workers=0`, which is a task and the
command that plans it in one process, on files that are made for it: one parquet file with one row
group of 228 MB, a text file of 120 MB, JSON lines of a few kilobytes of which one has 600 MB.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from yuzogpt.runtime.cores import available_cores

Result = dict[str, Any]


def run_yuzogpt(files: list[Path], workers: int, work: Path) -> Result:
    """Prepare on Ray Data; peak memory is that of each process, sampled."""
    from yuzogpt.config import CorpusSettings, DistributedPrepareSettings, PrepareSettings
    from yuzogpt.data.preparation.prepare import prepare
    from yuzogpt.orchestration.data.prepare import RayWorkers

    settings = PrepareSettings(
        corpus=CorpusSettings(dataset="openwebtext", source=str(files[0].parent)),
        preparation=DistributedPrepareSettings(num_workers=workers),
    )
    with RayWorkers(settings.preparation) as ray_workers, Memory() as memory:
        ray_workers.start()
        started = time.perf_counter()
        prepared, _ = prepare(settings, work / "corpus", ray_workers)
        seconds = time.perf_counter() - started
    manifest = prepared.manifest
    tokens = manifest.tokens("train") + manifest.tokens("val")
    return {"seconds": seconds, "tokens": tokens, "peak_mb": memory.peaks}


class Memory(threading.Thread):
    """Samples the resident memory of this process and its tasks, in MB by role."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, float] = {}
        self.ended = threading.Event()

    def __enter__(self) -> "Memory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        import psutil

        here = psutil.Process()
        while not self.ended.wait(0.2):
            for process in [here, *here.children(recursive=True)]:
                try:
                    name = "driver" if process == here else process.cmdline()[0].split(".")[0]
                    if "UnitSource" in name or process == here:
                        name = "driver" if process == here else "task"
                        shared = process.memory_info()
                        own = (shared.rss - shared.shared) / 1e6
                        self.peaks[name] = max(self.peaks.get(name, 0), own)
                except (psutil.Error, IndexError):
                    continue


def encode_file(path: Path) -> int:
    """Count the tokens of a file."""
    import pyarrow.parquet as pq

    texts = pq.read_table(path)["text"].to_pylist()
    encoding = ENCODING[0]
    return sum(len(encoding.encode_to_numpy(text, disallowed_special=())) for text in texts)


ENCODING: list[Any] = []


def load_encoding() -> None:
    """Build tiktoken's encoding with its own pattern, from the vocabulary we carry."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from yuzogpt.tokenization.tokenizer import gpt2_tokenizer

    ranks = gpt2_tokenizer().ranks
    special = {"<|endoftext|>": len(ranks)}
    ENCODING.append(
        tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
        )
    )


def run_tiktoken(files: list[Path], workers: int, work: Path) -> Result:
    """Tokenize in a pool whose processes are up and warm."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, load_encoding) as pool:
        pool.map(encode_file, [files[0]] * workers, chunksize=1)
        started = time.perf_counter()
        tokens = sum(pool.imap_unordered(encode_file, files))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": tokens}


def encode_row(row: dict[str, str]) -> dict[str, Any]:
    """Tokenize one row, as nanoGPT does."""
    if not ENCODING:
        load_encoding()
    ids = ENCODING[0].encode_ordinary(row["text"])
    ids.append(ENCODING[0].eot_token)
    return {"ids": ids, "len": len(ids)}


def run_nanogpt(files: list[Path], workers: int, work: Path) -> Result:
    """Map the dataset, then write it to one memmap in 1,024 pieces; loading is not counted."""
    import numpy as np
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    rows = load_dataset(
        "parquet", data_files=[str(file) for file in files], split="train", cache_dir=str(work)
    )
    started = time.perf_counter()
    splits = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    total = 0
    for name, split in splits.items():
        mapped = split.map(encode_row, remove_columns=["text"], num_proc=workers)
        count = int(np.sum(mapped["len"], dtype=np.uint64))
        total += count
        written = np.memmap(work / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(count,))
        place, pieces = 0, min(1024, len(mapped))
        for index in range(pieces):
            shard = mapped.shard(num_shards=pieces, index=index, contiguous=True)
            piece = np.concatenate(shard.with_format("numpy")["ids"])
            written[place : place + len(piece)] = piece
            place += len(piece)
        written.flush()
    return {"seconds": time.perf_counter() - started, "tokens": total}


SIDES = {"yuzogpt": run_yuzogpt, "tiktoken": run_tiktoken, "nanogpt": run_nanogpt}


def run_side(side: str, files: list[Path], workers: int) -> None:
    """Run one side in this process; the last line is its result."""
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(SIDES[side](files, workers, Path(work))))


def large_row_group(folder: Path, text: str) -> None:
    """Write 228 MB of documents as one row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = [text[start : start + 5_000] for start in range(0, len(text) - 5_000, 5_000)]
    documents *= 228_000_000 // (5_000 * len(documents)) + 1
    table = pa.table({"text": documents})
    pq.write_table(table, folder / "a.parquet", row_group_size=len(documents), compression=None)


def large_text(folder: Path, text: str) -> None:
    """Write a text file of 120 MB."""
    with (folder / "a.txt").open("w") as file:
        file.writelines([text] * (120_000_000 // len(text) + 1))


def large_line(folder: Path, text: str) -> None:
    """Write compressed JSON lines, one of which has 600 MB."""
    import pyarrow as pa

    with pa.CompressedOutputStream(str(folder / "a.jsonl.zst"), "zstd") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(600):
            file.write(b"a " * 500_000)
        file.write(b'"}\n{"text": "last"}\n')


def measure_memory() -> None:
    """Print how much memory each of the large sources takes."""
    # Sentences of English words, a token each but for the names.
    words = "the king of all that night and his men came to see what had been done there".split()
    generator = random.Random(0)
    sentences = (" ".join(generator.choices(words, k=12)) for _ in range(20_000))
    text = "".join(f"{sentence.capitalize()}.\n" for sentence in sentences)
    for write in (large_row_group, large_text, large_line):
        with tempfile.TemporaryDirectory() as work:
            source = Path(work) / "source"
            source.mkdir()
            write(source, text)
            flags = [f"--source={source}", f"--data_dir={work}/corpus", "--num_workers=0"]
            command = ["prepare", "mine", "--tokenizer=gpt2", *flags]
            output = subprocess.run(
                [sys.executable, "-c", MEASURED, *command],
                check=True,
                capture_output=True,
                text=True,
            )
            print(f"{write.__doc__} {output.stdout.strip().splitlines()[-1]}", flush=True)


MEASURED = """
import sys
from yuzogpt.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def copy_source(source: Path, copies: int, folder: Path) -> None:
    """Repeat a source by copies of its files: links to one file would be read once."""
    for file in sorted(source.glob("*.parquet")):
        for copy in range(copies):
            shutil.copyfile(file, folder / f"copy-{copy:03d}-{file.name}")


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--memory", action="store_true", help="only that; needs no source")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory()
        return
    if not arguments.source:
        parser.error("a source is needed")
    if arguments.side:
        run_side(arguments.side, sorted(arguments.source.iterdir()), arguments.workers)
        return
    results: dict[str, list[Result]] = {side: [] for side in arguments.sides}
    with tempfile.TemporaryDirectory() as folder:
        copy_source(arguments.source, arguments.copies, Path(folder))
        for pair in range(arguments.pairs):
            for side in arguments.sides:
                command = [sys.executable, __file__, folder, f"--side={side}"]
                command.append(f"--workers={arguments.workers}")
                output = subprocess.run(command, check=True, capture_output=True, text=True)
                result = json.loads(output.stdout.splitlines()[-1])
                results[side].append(result)
                speed = result["tokens"] / result["seconds"] / 1e6
                print(f"pair {pair + 1}: {side}: {speed:.2f} million tokens/s {result}", flush=True)
    ours = statistics.median(r["seconds"] / r["tokens"] for r in results["yuzogpt"])
    for side, runs in results.items():
        theirs = statistics.median(r["seconds"] / r["tokens"] for r in runs)
        print(
            f"{side}: {1e-6 / theirs:.2f} million tokens/s; yuzogpt / {side} = {theirs / ours:.2f}"
        )


if __name__ == "__main__":
    main()
