"""Split rules: nanoGPT's is that of the `datasets` library, row for row."""

import hashlib

import numpy as np
import pytest
from datasets import Dataset

from yuzogpt.data.preparation.splits import SPLIT_RULES, Split, nanogpt_val_rows


@pytest.mark.parametrize(
    ("documents", "fraction"), [(2, 0.0005), (1_999, 0.0005), (2_001, 0.0005), (15_147, 0.3)]
)
def test_nanogpt_holds_out_what_datasets_does(documents, fraction):
    rows = Dataset.from_dict({"row": range(documents)})
    reference = rows.train_test_split(test_size=fraction, seed=2357, shuffle=True)["test"]["row"]
    assert nanogpt_val_rows(documents, fraction).tolist() == list(reference)


def test_one_document_stays_in_train():
    assert nanogpt_val_rows(1, 0.5).tolist() == []


def test_is_val_does_not_depend_on_how_the_source_is_cut():
    split, digests = Split("nanogpt", 0.1, 1000), [b""] * 1000
    whole = split.is_val(0, digests)
    parts = [split.is_val(start, digests[start : start + 7]) for start in range(0, 1000, 7)]
    assert np.flatnonzero(whole).tolist() == sorted(nanogpt_val_rows(1000, 0.1).tolist())
    assert np.array_equal(np.concatenate(parts), whole)


def test_hash_holds_out_its_share_by_content_alone():
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(20_000)]
    split = Split("hash", 0.25, None)
    held_out = split.is_val(None, digests)
    assert held_out.mean() == pytest.approx(0.25, abs=0.02)
    assert np.array_equal(split.is_val(None, digests[::-1]), held_out[::-1])


def test_no_two_rules_hold_out_the_same():
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(1000)]
    held_out = {Split(rule, 0.25, 1000).is_val(0, digests).tobytes() for rule in SPLIT_RULES}
    assert len(held_out) == len(SPLIT_RULES)
