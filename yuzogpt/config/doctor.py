"""`yuzogpt doctor`."""

from typing import Literal

from yuzogpt.config.section import Count, NonNegative, Section, setting


class SoundnessSettings(Section):
    """What is checked, and what a healthy cluster must have."""

    ray_address: str = setting(
        "", "check the Ray cluster at this address; empty: RAY_ADDRESS if set, else this machine"
    )
    num_nodes: Count = setting(0, "expected number of nodes, including the head; 0: any")
    storage: str = setting(
        "", "directory or URI that all nodes share; empty: not checked", path="remote"
    )
    min_bandwidth_mbit: NonNegative = setting(
        500.0, "lowest bandwidth between any two nodes", "Mbit/s"
    )
    max_latency_ms: NonNegative = setting(5.0, "longest round trip between any two nodes", "ms")
    max_clock_skew_s: NonNegative = setting(
        1.0, "largest difference of a node's clock from the others'", "s"
    )
    min_storage_mb_s: NonNegative = setting(20.0, "lowest write speed to storage", "MB/s")
    min_disk_gb: NonNegative = setting(
        5.0, "least free space in storage, and on each node for Ray's files", "GB"
    )
    min_memory_gb: NonNegative = setting(2.0, "least free memory on each node", "GB")
    output: Literal["table", "json"] = setting("table", "--json is short for --output=json")


class DoctorSettings(Section):
    """`yuzogpt doctor`."""

    doctor: SoundnessSettings = SoundnessSettings()
