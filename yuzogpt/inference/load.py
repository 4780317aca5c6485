"""Load a model into an engine.

Importing this imports torch, which takes seconds: commands check the user's settings first.
"""

from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import ModelReference
from yuzogpt.config import DeviceSettings
from yuzogpt.config.sample import check_not_compiled
from yuzogpt.errors import UserError
from yuzogpt.inference.engine import Engine
from yuzogpt.inference.kv_cache import bytes_per_slot
from yuzogpt.inference.packed_linear import activation_dtype, choose_dtype
from yuzogpt.runtime.device import choose_hardware, device_memory
from yuzogpt.runtime.world import World
from yuzogpt.tokenization.tokenizer import Tokenizer

MAX_CACHE_BYTES = 4 * 2**30  # keys and values of all slots


def load_engine(
    reference: ModelReference,
    tokenizer: Tokenizer,
    settings: DeviceSettings,
    slots: int,
    prefill_chunk: int = 64,
    packed: bool = True,
    exact: bool = False,
    compiled: bool = False,
) -> Engine:
    """Load a model into an engine with this many slots, or as many as fit in MAX_CACHE_BYTES.

    `packed=False`: float32 weights on a CPU stay memory-mapped from their file.
    `exact`: if the run has replaced the checkpoint, raise FileNotFoundError; do not load its
    successor.
    """
    device = choose_hardware(settings, World()).device
    if compiled:
        check_not_compiled(device.type)
    dtype = choose_dtype(settings.dtype, device)
    needed = bytes_per_slot(reference.shape, activation_dtype(dtype, device))
    available = device_memory(device)
    if needed > available:
        raise UserError(
            f"--context={reference.shape.block_size}: keys and values of so many tokens take "
            f"{needed / 1e9:,.1f} GB, and there are {available / 1e9:,.1f}; lower it"
        )
    slots = max(1, min(slots, MAX_CACHE_BYTES // needed))
    model = load_model(reference, exact)
    return Engine(model, tokenizer, device, dtype, slots, prefill_chunk, packed, compiled=compiled)
