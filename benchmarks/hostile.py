"""Thousands of hostile files: every variant, read by every verb that takes such a file.

    python benchmarks/hostile.py [--seeds 1 2 3] [--count 30] [--only WORDS]

The tests (tests/hostile) run one seed with few random variants, each with one verb. This script
runs each with every verb, prints faults as they come, and at the end the cases by verb. Exit status
1 if any answer was neither the right result nor one line.
"""

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.hostile.cases import cases
from tests.hostile.harness import fault_of
from tests.hostile.test_hostile import make_whole


def main() -> None:
    """Run the cases of all seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--count", type=int, default=30, help="random variants of each file")
    parser.add_argument("--only", default="", help="cases whose verb and name have these words")
    options = parser.parse_args()
    import torch  # noqa: F401 (once, not in each fork)

    counted: collections.Counter[str] = collections.Counter()
    faults = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        whole = make_whole(Path(directory))
        for seed in options.seeds:
            for case in cases(whole, seed, options.count, every=True):
                name = f"{case.verb}, {case.name}"
                if not all(word in name for word in options.only.split()):
                    continue
                counted[case.verb] += 1
                if fault := fault_of(case, Path(directory) / "place"):
                    faults += 1
                    print(f"seed {seed}: {name}: {fault}", flush=True)
    seconds = time.monotonic() - started
    by_verb = ", ".join(f"{verb} {number}" for verb, number in sorted(counted.items()))
    print(f"{counted.total()} cases ({by_verb}) in {seconds:.0f} s: {faults} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
