"""Checkpoints that tests write, all of them in this process."""

from yuzogpt import checkpoints
from yuzogpt.checkpoints.safetensors_file import write_tensors
from yuzogpt.storage.run_storage import LocalStorage


def write_checkpoint(run, state, model, optimizer, tokenizer):
    """Write a checkpoint, and read it back to verify it."""
    temporary = checkpoints.begin(LocalStorage(run), state.step)
    hashes, contents = {}, {}
    for kind, tensors in ((checkpoints.MODEL, model), (checkpoints.OPTIMIZER, optimizer)):
        name = checkpoints.tensor_file(kind, 0, 1)
        hashes[name] = write_tensors(temporary.local / name, tensors, tensors.values())
        contents[name] = list(tensors)
    return checkpoints.commit(temporary, state, tokenizer, hashes, contents)
