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
    least_bandwidth: NonNegative = setting(500.0, "between any two nodes", "Mbit/s")
    most_latency: NonNegative = setting(5.0, "between any two nodes, there and back", "ms")
    most_skew: NonNegative = setting(1.0, "of a node's clock", "s")
    least_storage_speed: NonNegative = setting(20.0, "writing to storage", "MB/s")
    least_disk: NonNegative = setting(
        5.0, "free in storage, and on each node for Ray's files", "GB"
    )
    least_memory: NonNegative = setting(2.0, "free on each node", "GB")
    output: Literal["table", "json"] = setting("table", "--json is short for --output=json")


class DoctorSettings(Section):
    """`yuzogpt doctor`."""

    doctor: SoundnessSettings = SoundnessSettings()
