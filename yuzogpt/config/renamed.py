"""Settings that had other names in earlier versions: the old names still work."""

from collections.abc import Mapping
from typing import Any

RENAMED_SECTIONS = {"large": "preparation", "work": "workers"}
RENAMED_SETTINGS = {
    "batch_lr_power": "lr_batch_exponent",
    "embedding_rate": "embedding_lr_mult",
    "hang_timeout": "hang_timeout_s",
    "head_rate": "head_lr_mult",
    "least_bandwidth": "min_bandwidth_mbit",
    "least_disk": "min_disk_gb",
    "least_memory": "min_memory_gb",
    "least_storage_speed": "min_storage_mb_s",
    "matrix_rate": "matrix_lr_mult",
    "max_skipped": "max_nonfinite_steps",
    "most_latency": "max_latency_ms",
    "most_skew": "max_clock_skew_s",
    "ramp_iters": "batch_ramp_iters",
    "spare_workers": "warm_spare_workers",
    "start_rows": "batch_start_rows",
}


def current_name(key: str) -> str:
    """Return the present name of a setting, `leaf` or `section.leaf`, whichever it was given by."""
    section, dot, leaf = key.rpartition(".")
    section = RENAMED_SECTIONS.get(section, section)
    return f"{section}{dot}{RENAMED_SETTINGS.get(leaf, leaf)}"


def with_current_names(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return settings by section and leaf, as another version may have written them, renamed."""
    return {
        RENAMED_SECTIONS.get(section, section): {
            current_name(leaf): value for leaf, value in leaves.items()
        }
        for section, leaves in settings.items()
    }
