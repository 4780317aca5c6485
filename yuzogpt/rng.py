"""The hash from which all random numbers of data order, dropout and sampling derive.

There is no generator whose state a checkpoint would have to hold: a random number is the hash of
what it is for, such as (seed, row, dropout layer). Next: model/gpt.py.
"""

import numpy as np
import numpy.typing as npt

Uint64s = npt.NDArray[np.uint64]


def scramble(values: Uint64s) -> Uint64s:
    """Hash 64-bit numbers: every bit of the output depends on every bit of the input.

    The step of SplitMix64 (Steele et al., 2014), whose state here is the value to hash.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
