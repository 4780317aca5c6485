"""Stateless random numbers for data order, dropout and sampling.

There is no generator whose state a checkpoint would have to hold: each number is a hash of its
inputs. Next: model/gpt.py.
"""

import numpy as np
import numpy.typing as npt

Uint64s = npt.NDArray[np.uint64]


def scramble(values: Uint64s) -> Uint64s:
    """Mix 64-bit numbers so that each bit depends on all (SplitMix64; Steele et al., 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
