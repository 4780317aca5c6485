"""Files of others, hundreds of them: each ends in its right answer or in one line, never else.

benchmarks/hostile.py runs as many as one likes, by every verb.
"""

import collections
from pathlib import Path

import pytest

from tests.conftest import TINY, make_text, prepare_char_corpus, yuzogpt
from tests.hostile.cases import Whole, cases
from tests.hostile.harness import fault_of

pytestmark = pytest.mark.slow

SEED, COUNT, PARTS = 20, 4, 2


def make_whole(place: Path) -> Whole:
    """Make one of each that is right."""
    (place / "text.txt").write_text(make_text(4_000))
    corpus = prepare_char_corpus(place / "text.txt", place / "corpus")
    flags = (*TINY, "--eval_interval=3", "--keep_last=1", "--health_interval=2", "--min_lr=1e-3")
    command = ["train", *flags, f"--data_dir={corpus}", "--num_workers=0", "--max_iters=3",
               "--bias=True"]  # fmt: skip
    trained = yuzogpt(*command, f"--out_dir={place / 'run'}")
    assert trained.returncode == 0, trained.stderr
    exported = yuzogpt("export", str(place / "run"), "--to=huggingface", str(place / "one-file"))
    assert exported.returncode == 0, exported.stderr
    return Whole(corpus, place / "run", in_two_files(place / "one-file"), (*flags, "--bias=True"))


def in_two_files(folder: Path) -> Path:
    """Have transformers write a Hugging Face folder again, in shards and with an index."""
    from transformers import GPT2LMHeadModel

    sharded = folder.with_name("folder")
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained(sharded, max_shard_size="60KB")
    for path in folder.glob("tokenizer*"):
        (sharded / path.name).write_bytes(path.read_bytes())
    assert (sharded / "model.safetensors.index.json").exists()
    return sharded


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return make_whole(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("part", range(PARTS))
def test_every_answer_is_right_or_one_line(whole, tmp_path, part):
    import torch  # noqa: F401 (once, not in each fork)

    counted, faults = collections.Counter(), []
    for index, case in enumerate(cases(whole, SEED, COUNT)):
        if index % PARTS == part:
            counted[case.verb] += 1
            if fault := fault_of(case, tmp_path / "place"):
                faults.append(f"{case.verb}, {case.name}: {fault}")
    print(dict(counted))
    assert sum(counted.values()) >= 100
    assert not faults, "\n".join([f"{len(faults)} of {sum(counted.values())}", *faults])


def test_what_is_whole_is_read(whole, tmp_path):
    """The commands of the cases do their work where nothing is damaged."""
    from tests.hostile.cases import Case, commands_of_corpus, commands_of_run

    for original, commands in (
        (whole.run, commands_of_run(whole)),
        (whole.corpus, commands_of_corpus(whole)),
    ):
        for verb, command in commands.items():
            place = tmp_path / verb
            case = Case("whole", original, lambda copy: None, verb, command)
            assert fault_of(case, place) is None
            assert (place / "stderr").read_text().count("yuzogpt: ") == (verb == "serve"), verb
