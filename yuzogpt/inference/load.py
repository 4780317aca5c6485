"""From a reference to an engine that is ready to decode.

In: a model that exists, and what it is to run on. Out: an Engine. Imports torch, which takes
seconds: whoever answers to a user calls this when the user's mistakes have shown.
"""

from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import ModelReference
from yuzogpt.config import DeviceSettings
from yuzogpt.config.sample import check_not_compiled
from yuzogpt.errors import UserError
from yuzogpt.inference.engine import Engine
from yuzogpt.inference.kv_cache import bytes_per_slot
from yuzogpt.inference.packed_linear import activations, choose_dtype
from yuzogpt.runtime.device import choose_hardware, device_memory
from yuzogpt.runtime.world import World
from yuzogpt.tokenization.tokenizer import Tokenizer

CACHE_BYTES = 4 * 2**30  # at most, for the keys and values of all slots


def load_engine(
    reference: ModelReference,
    tokenizer: Tokenizer,
    settings: DeviceSettings,
    slots: int,
    chunk: int = 64,
    packed: bool = True,
    exact: bool = False,
    compiled: bool = False,
) -> Engine:
    """Load a model into an engine with so many slots, or as many as memory is set apart for.

    `packed=False`: float32 weights on a CPU stay as they lie in their file, memory-mapped.
    `exact`: FileNotFoundError for a checkpoint that its run has replaced, not the one after it.
    """
    device = choose_hardware(settings, World()).device
    if compiled:
        check_not_compiled(device.type)
    dtype = choose_dtype(settings.dtype, device)
    need = bytes_per_slot(reference.shape, activations(dtype, device))
    there = device_memory(device)
    if need > there:
        raise UserError(
            f"--context={reference.shape.block_size}: keys and values of so many tokens take "
            f"{need / 1e9:,.1f} GB, and there are {there / 1e9:,.1f}; lower it"
        )
    slots = max(1, min(slots, CACHE_BYTES // need))
    model = load_model(reference, exact)
    return Engine(model, tokenizer, device, dtype, slots, chunk, packed, compiled=compiled)
