"""Samples from the best checkpoint of a run. torch is imported if there is one, and not before."""

from yuzogpt import checkpoints
from yuzogpt.config import SampleSettings, SamplingDeviceSettings, SamplingSettings
from yuzogpt.console.terminal import complain, note
from yuzogpt.errors import UserError
from yuzogpt.storage.run_storage import RunStorage

MAX_NEW_TOKENS = 200


def draw(run: RunStorage, count: int) -> list[str]:
    """Return `count` samples, the first of `yuzogpt sample`; none if there is no checkpoint.

    They are drawn on one core of the CPU: the run may be training on the rest.
    """
    try:
        if not count or checkpoints.find(run) is None:
            return []
        from yuzogpt.inference.sample import sample

        note(f"drawing {count} samples (--num_samples=0 leaves them out)")
        source = SamplingSettings(
            out_dir=run.display_name, num_samples=count, max_new_tokens=MAX_NEW_TOKENS
        )
        device = SamplingDeviceSettings(device="cpu", threads=1)
        return list(sample(SampleSettings(sampling=source, device=device)))
    except (UserError, OSError) as error:
        complain(f"no samples: {error}")
        return []
