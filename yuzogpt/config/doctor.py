"""`yuzogpt doctor`."""

from typing import Literal

from yuzogpt.config.section import Count, NonNegative, Section, setting


class SoundnessSettings(Section):
    """What is examined, and what a sound cluster must have."""

    ray_address: str = setting("", "the cluster; empty: RAY_ADDRESS, else this machine")
    num_nodes: Count = setting(0, "nodes that must be there, the head included; 0: any number")
    storage: str = setting(
        "",
        "what all nodes share: a directory or URI; empty: not examined",
        path="remote",
        if_empty="",
    )
    min_bandwidth_mbit: NonNegative = setting(500.0, "between any two nodes", "Mbit/s")
    max_latency_ms: NonNegative = setting(5.0, "between any two nodes, there and back", "ms")
    max_clock_skew_s: NonNegative = setting(1.0, "of a node's clock", "s")
    min_storage_mb_s: NonNegative = setting(20.0, "writing to storage", "MB/s")
    min_disk_gb: NonNegative = setting(
        5.0, "free in storage, and on each node for Ray's files", "GB"
    )
    min_memory_gb: NonNegative = setting(2.0, "free on each node", "GB")
    output: Literal["table", "json"] = setting("table", "--json is short for --output=json")


class DoctorSettings(Section):
    """`yuzogpt doctor`."""

    doctor: SoundnessSettings = SoundnessSettings()
