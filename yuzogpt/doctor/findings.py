"""Diagnoses a survey of a cluster: what is wrong, and what to do about it.

A `fault` keeps a run from working or from being safe; a `warning` makes it slow, or may.
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from yuzogpt.config import SoundnessSettings
from yuzogpt.doctor.links import Link
from yuzogpt.doctor.survey import Survey
from yuzogpt.storage.filesystems import scheme_of

SLOW_LINK_SHARE = 0.25  # of the usual bandwidth
MAX_IDLE_LOAD = 0.5  # per core, while nothing trains
MAX_IDLE_GPU_PERCENT = 10.0
MEGABIT, GIGABYTE = 1e6, 1e9
TOKEN_DEMANDED = (401, 403)  # HTTP status: no token, a wrong one


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    level: Literal["fault", "warning"]
    where: str
    what: str
    remedy: str


def diagnose(survey: Survey, settings: SoundnessSettings) -> list[Finding]:
    """Return everything that is wrong, faults first."""
    checks = (
        presence(survey, settings),
        versions(survey),
        room(survey, settings),
        storage(survey, settings),
        clocks(survey, settings),
        links(survey, settings),
        interfaces(survey),
        security(survey),
        gpus(survey),
        idleness(survey),
        parts(survey),
    )
    findings = [finding for check in checks for finding in check]
    return sorted(findings, key=lambda finding: finding.level != "fault")


def presence(survey: Survey, settings: SoundnessSettings) -> Iterator[Finding]:
    """Are all nodes there, and do they answer?"""
    joined = len(survey.nodes) + len(survey.silent)
    if joined < settings.num_nodes:
        yield Finding(
            "fault",
            "cluster",
            f"{joined} of {settings.num_nodes} nodes have joined",
            "see `ray status` and the missing node's log: another Ray or Python is refused; nodes "
            "that come with a job come for `min_workers`, too",
        )
    elif joined == 1 and not survey.head.takes_work:
        what = "only the head has joined, which does no work: no worker was examined"
        yield Finding(
            "warning", "cluster", what, "set `min_workers`, run `ray up` and then the doctor again"
        )
    for node, why in survey.silent.items():
        ports = "open all TCP ports between the nodes; " * why.startswith("not within")
        yield Finding("fault", node, f"does not answer ({why})", ports + remedy_for(why))


def remedy_for(why: str) -> str:
    """Return what to do about an error that a node reports."""
    is_import = "ImportError" in why or "ModuleNotFound" in why
    return "install the project there as on the others; " * is_import + "see Ray's logs there"


def versions(survey: Survey) -> Iterator[Finding]:
    """Do all nodes have the same versions?"""
    names = dict.fromkeys(name for node in survey.nodes.values() for name in node.versions)
    with_gpu = {name: node for name, node in survey.nodes.items() if node.gpus}
    for name in names:
        nodes = with_gpu if name in ("cuda", "driver") else survey.nodes
        installed = {node: facts.versions.get(name, "none") for node, facts in nodes.items()}
        usual, _ = Counter(installed.values()).most_common(1)[0] if installed else ("", 0)
        for node, version in installed.items():
            if version != usual:
                level: Literal["fault", "warning"] = "warning" if name == "driver" else "fault"
                what = f"{name} {version}, where others have {usual}"
                yield Finding(level, node, what, "install the project there as on the others")


def room(survey: Survey, settings: SoundnessSettings) -> Iterator[Finding]:
    """Is there enough disk and memory?"""
    for name, node in survey.nodes.items():
        for part, what, free, least, remedy in (
            ("memory", "memory", node.memory, settings.min_memory_gb, "end what uses it"),
            ("disk", "disk for Ray's files", node.temporary, settings.min_disk_gb, "make room"),
        ):
            if part not in node.problems and free < least * GIGABYTE:
                text = f"{what}: {free / GIGABYTE:.1f} GB free, {least:g} wanted"
                yield Finding("fault", name, text, remedy)


def storage(survey: Survey, settings: SoundnessSettings) -> Iterator[Finding]:
    """Can every node write where runs go, fast enough, and see what others wrote?"""
    storage = settings.storage
    for node, result in survey.storage.items():
        if result.problem:
            remedy = "mount it for writing there, as the user that Ray runs as"
            if scheme_of(storage):
                remedy = "see the bucket's name and region, and that node's credentials"
            yield Finding("fault", node, f"{storage} cannot be written ({result.problem})", remedy)
        elif result.written is not None and result.written < settings.min_storage_mb_s * 1e6:
            speed = f"{result.written / 1e6:.1f} MB/s"
            what = f"{storage} takes {speed}, {settings.min_storage_mb_s:g} wanted"
            yield Finding("warning", node, what, "checkpoints will be slow; see the network to it")
        if result.free is not None and result.free < settings.min_disk_gb * GIGABYTE:
            what = (
                f"{storage}: {result.free / GIGABYTE:.1f} GB free, {settings.min_disk_gb:g} wanted"
            )
            yield Finding("fault", node, what, "make room")
    for node, others in survey.unseen.items():
        if others:
            what = f"{storage}: what {', '.join(others)} wrote is not there"
            yield Finding("fault", node, what, "mount the same directory on every node, or use s3")


def clocks(survey: Survey, settings: SoundnessSettings) -> Iterator[Finding]:
    """Do all clocks agree? Leases and reports compare their times."""
    if not survey.clocks:
        return
    middle = statistics.median_low(ahead for ahead, _ in survey.clocks.values())
    for node, (ahead, uncertain) in survey.clocks.items():
        skew = ahead - middle
        if abs(skew) - uncertain <= settings.max_clock_skew_s:
            continue
        if len(survey.clocks) == 2:
            what = f"the clocks of {' and '.join(survey.clocks)} are {abs(skew):.1f} s apart"
            yield Finding("fault", "cluster", what, "set both by NTP (chrony, systemd-timesyncd)")
        else:
            way = "ahead of" if skew > 0 else "behind"
            what = f"its clock is {abs(skew):.1f} s {way} the others"
            yield Finding("fault", node, what, "set it by NTP (chrony, systemd-timesyncd)")


def links(survey: Survey, settings: SoundnessSettings) -> Iterator[Finding]:
    """Do all nodes reach each other, fast enough?"""
    remedy = "open all TCP ports between the nodes: workers use ports that the system chooses"
    for link in survey.links:
        if link.problem:
            what = f"cannot be reached from {link.source} ({link.problem})"
            yield Finding("fault", link.target, what, remedy)
    measured = [link for link in survey.links if not link.problem]
    if not measured:
        return
    # The upper quartile: one slow node of four makes half of all links slow.
    usual = sorted(link.bandwidth for link in measured)[len(measured) * 3 // 4]
    least = max(settings.min_bandwidth_mbit * MEGABIT, SLOW_LINK_SHARE * usual)
    slow = [link for link in measured if link.bandwidth < least]
    if len(slow) == len(measured) > 2:
        worst = min(slow, key=lambda link: link.bandwidth)
        what = f"all links are slow: {worst.bandwidth / MEGABIT:,.0f} Mbit/s and more"
        lowest = f"--min_bandwidth_mbit={settings.min_bandwidth_mbit:g}"
        remedy = f"choose other interfaces, or lower {lowest}"
        yield Finding("fault", "cluster", what, remedy)
        slow = []
    for node, slow_links in by_culprit(slow).items():
        worst = min(slow_links, key=lambda link: link.bandwidth)
        speed = f"{worst.bandwidth / MEGABIT:,.0f} Mbit/s from {worst.source} to {worst.target}"
        what = f"slow link: {speed}; the others have {usual / MEGABIT:,.0f}"
        remedy = "see its cable, port and interface (ethtool); every step waits for the slowest"
        level: Literal["fault", "warning"] = (
            "fault" if worst.bandwidth < settings.min_bandwidth_mbit * MEGABIT else "warning"
        )
        yield Finding(level, node, what, remedy)
    for link in measured:
        if link.latency > settings.max_latency_ms / 1000:
            what = f"{1000 * link.latency:.1f} ms to {link.target} and back"
            yield Finding("warning", link.source, what, "place the nodes closer to each other")
    if survey.network_problem:
        what = f"an all-reduce of all nodes failed ({survey.network_problem})"
        yield Finding("fault", "cluster", what, "see interfaces, names and ports above")


def by_culprit(slow: Sequence[Link]) -> dict[str, list[Link]]:
    """Return slow links by the node that most of them have in common."""
    by_node: dict[str, list[Link]] = {}
    remaining = list(slow)
    while remaining:
        ends = Counter(end for link in remaining for end in (link.source, link.target))
        node, _ = ends.most_common(1)[0]
        by_node[node] = [link for link in remaining if node in (link.source, link.target)]
        remaining = [link for link in remaining if link not in by_node[node]]
    return by_node


def interfaces(survey: Survey) -> Iterator[Finding]:
    """Will collectives use the interface that Ray uses?"""
    for name, node in survey.nodes.items():
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            choice = node.choices.get(variable, "")
            if choice and not is_known(choice, node.interfaces, variable == "GLOO_SOCKET_IFNAME"):
                names = ", ".join(node.interfaces)
                what = f"{variable}={choice}: no such interface; there are {names}"
                yield Finding("fault", name, what, "correct or unset it")
        if not node.interface and "interfaces" not in node.problems:
            what = f"no interface has {node.address}, the address that it joined with"
            yield Finding("fault", name, what, "ray start --node-ip-address=ITS_ADDRESS")
        if len(survey.nodes) > 1 and node.address.startswith("127."):
            what = f"joined as {node.address}, which no other node reaches"
            yield Finding("fault", name, what, "ray start --node-ip-address=ITS_ADDRESS")


def is_known(choice: str, interfaces: Sequence[str], exactly: bool) -> bool:
    """Return whether a variable names existing interfaces; NCCL takes prefixes, =NAME and ^NAME."""
    if choice.startswith("^"):
        return True
    if exactly or choice.startswith("="):
        return all(part in interfaces for part in choice.lstrip("=").split(","))
    return any(name.startswith(part) for part in choice.split(",") for name in interfaces)


def security(survey: Survey) -> Iterator[Finding]:
    """Does Ray demand its token (a job is any code)? Has a stopped job time for a checkpoint?"""
    head = survey.head
    if not survey.is_shared or head.name not in survey.nodes:
        return
    status = head.jobs_status
    is_answer = status is not None and (200 <= status < 300 or status in TOKEN_DEMANDED)
    if status is not None and not is_answer:
        what = f"the jobs API does not answer{f' (HTTP {status})' * bool(status)}"
        yield Finding("fault", head.name, what, "see dashboard.log among Ray's logs there")
    if (status not in TOKEN_DEMANDED) if is_answer else not head.token_mode:
        what = "token authentication is off: anyone who reaches Ray's ports can run code there"
        remedy = "RAY_AUTH_MODE=token before `ray start` on every node, and ~/.ray/auth_token, 0600"
        yield Finding("fault", head.name, what, remedy)
    if head.seen_by and not head.is_pod:
        what = f"the dashboard can be reached from {', '.join(head.seen_by)}"
        yield Finding("warning", head.name, what, "ray start --dashboard-host=127.0.0.1")
    if (head.stop_wait or 0.0) < 30:
        value = "not set: 3 s" if head.stop_wait is None else f"{head.stop_wait:g} s"
        what = f"RAY_JOB_STOP_WAIT_TIME_S: {value}; a stopped job needs time for its checkpoint"
        yield Finding("warning", head.name, what, "RAY_JOB_STOP_WAIT_TIME_S=60 before `ray start`")


def gpus(survey: Survey) -> Iterator[Finding]:
    """Are the GPUs sound, and free?"""
    for name, node in survey.nodes.items():
        for remark in node.gpu_remarks:
            yield Finding("warning", name, f"nvidia-smi: {remark}", "see `nvidia-smi -q` there")
        if "GPUs" in node.problems:
            continue
        if node.gpu_problem:
            level: Literal["fault", "warning"] = "fault" if node.counted_gpus else "warning"
            yield Finding(level, name, node.gpu_problem, "see `nvidia-smi` and `dmesg` there")
            continue
        if node.usable_gpus < len(node.gpus):
            what = f"torch can use {node.usable_gpus} of its {len(node.gpus)} GPUs"
            remedy = "install torch's build for CUDA, and a driver that is new enough for it"
            yield Finding("fault", name, what, remedy)
        if node.gpus and not node.counted_gpus and survey.is_shared:
            what = f"Ray counts none of its {len(node.gpus)} GPUs"
            yield Finding("warning", name, what, f"ray start --num-gpus={len(node.gpus)}")
        if len(node.gpus) < node.counted_gpus:
            what = f"nvidia-smi finds {len(node.gpus)} of the {node.counted_gpus} GPUs Ray counts"
            yield Finding("fault", name, what, "see `nvidia-smi` and `dmesg` there")
        for index, gpu in enumerate(node.gpus):
            if gpu.errors:
                what = f"GPU {index}: {gpu.errors} memory errors that were not corrected"
                yield Finding("fault", name, what, "reset or replace it")
            if gpu.used > 0.1 * gpu.memory or (gpu.busy or 0.0) > MAX_IDLE_GPU_PERCENT:
                what = f"GPU {index}: {gpu.used / GIGABYTE:.1f} GB used, {gpu.busy or 0:.0f}% busy"
                yield Finding("warning", name, what, "end what runs there, or start after it ended")


def idleness(survey: Survey) -> Iterator[Finding]:
    """Are the nodes idle, as they should be before a run?"""
    for name, node in survey.nodes.items():
        cores = node.machine_cores or node.cores  # the load is the machine's
        if node.cores and node.load > MAX_IDLE_LOAD * cores + 1:
            what = f"load {node.load:.1f} on {cores} cores, although nothing trains yet"
            yield Finding("warning", name, what, "see `top` there")


def parts(survey: Survey) -> Iterator[Finding]:
    """Could every part be examined?"""
    of_nodes = (
        (name, part, why)
        for name, node in survey.nodes.items()
        for part, why in node.problems.items()
    )
    for where, part, why in (*of_nodes, *survey.problems):
        what = f"its {part} could not be examined ({why})"
        yield Finding("fault", where, what, remedy_for(why))
