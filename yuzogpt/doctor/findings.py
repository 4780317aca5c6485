"""From what was found out about a cluster to what is wrong with it, and what to do.

In: a survey, and what a sound cluster must have. Out: findings: `fault` keeps a run from working,
or from being safe; `warning` makes it slow, or may.
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

SLOW_LINK = 0.25  # of what links usually have
BUSY = 0.5  # of a core each: what a node does although nothing trains
BUSY_GPU = 10.0  # percent
MEGABIT, GIGABYTE = 1e6, 1e9
REFUSED = (401, 403)  # HTTP: no token, a wrong one


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    level: Literal["fault", "warning"]
    where: str
    what: str
    remedy: str


def judge(survey: Survey, wanted: SoundnessSettings) -> list[Finding]:
    """Return everything that is wrong, faults first."""
    checks = (
        presence(survey, wanted),
        versions(survey),
        room(survey, wanted),
        storage(survey, wanted),
        clocks(survey, wanted),
        links(survey, wanted),
        interfaces(survey),
        security(survey),
        gpus(survey),
        idleness(survey),
        parts(survey),
    )
    found = [finding for check in checks for finding in check]
    return sorted(found, key=lambda finding: finding.level != "fault")


def presence(survey: Survey, wanted: SoundnessSettings) -> Iterator[Finding]:
    """Are all nodes there, and do they answer?"""
    there = len(survey.nodes) + len(survey.silent)
    if there < wanted.num_nodes:
        yield Finding(
            "fault",
            "cluster",
            f"{there} of {wanted.num_nodes} nodes have joined",
            "see `ray status` and the missing node's log: another Ray or Python is refused; nodes "
            "that come with a job come for `min_workers`, too",
        )
    elif there == 1 and not survey.head.takes_work:
        what = "only the head is there, which does no work: no worker was examined"
        yield Finding("warning", "cluster", what, "set `min_workers`, `ray up`, and ask again")
    for node, why in survey.silent.items():
        remedy = "see Ray's logs there"
        if why.startswith("not within"):
            remedy = f"open all TCP ports between the nodes; {remedy}"
        elif "ImportError" in why or "ModuleNotFound" in why:
            remedy = f"install the project there as on the others; {remedy}"
        yield Finding("fault", node, f"does not answer ({why})", remedy)


def versions(survey: Survey) -> Iterator[Finding]:
    """Do all nodes have the same?"""
    names = dict.fromkeys(name for node in survey.nodes.values() for name in node.versions)
    with_gpu = {name: node for name, node in survey.nodes.items() if node.gpus}
    for name in names:
        those = with_gpu if name in ("cuda", "driver") else survey.nodes
        have = {node: facts.versions.get(name, "none") for node, facts in those.items()}
        most, _ = Counter(have.values()).most_common(1)[0] if have else ("", 0)
        for node, version in have.items():
            if version != most:
                level: Literal["fault", "warning"] = "warning" if name == "driver" else "fault"
                what = f"{name} {version}, where others have {most}"
                yield Finding(level, node, what, "install the project there as on the others")


def room(survey: Survey, wanted: SoundnessSettings) -> Iterator[Finding]:
    """Is there disk and memory?"""
    for name, node in survey.nodes.items():
        for part, what, free, least, remedy in (
            ("memory", "memory", node.memory, wanted.min_memory_gb, "end what uses it"),
            ("disk", "disk for Ray's files", node.temporary, wanted.min_disk_gb, "make room"),
        ):
            if part not in node.problems and free < least * GIGABYTE:
                text = f"{what}: {free / GIGABYTE:.1f} GB free, {least:g} wanted"
                yield Finding("fault", name, text, remedy)


def storage(survey: Survey, wanted: SoundnessSettings) -> Iterator[Finding]:
    """Can every node write where runs go, fast enough, and see what others wrote?"""
    place = wanted.storage
    for node, found in survey.storage.items():
        if found.problem:
            remedy = "mount it for writing there, as the user that Ray runs as"
            if scheme_of(place):
                remedy = "see the bucket's name and region, and that node's credentials"
            yield Finding("fault", node, f"{place} cannot be written ({found.problem})", remedy)
        elif found.written is not None and found.written < wanted.min_storage_mb_s * 1e6:
            speed = f"{found.written / 1e6:.1f} MB/s"
            what = f"{place} takes {speed}, {wanted.min_storage_mb_s:g} wanted"
            yield Finding("warning", node, what, "checkpoints will be slow; see the way to it")
        if found.free is not None and found.free < wanted.min_disk_gb * GIGABYTE:
            what = f"{place}: {found.free / GIGABYTE:.1f} GB free, {wanted.min_disk_gb:g} wanted"
            yield Finding("fault", node, what, "make room")
    for node, others in survey.unseen.items():
        if others:
            what = f"{place}: what {', '.join(others)} wrote is not there"
            yield Finding("fault", node, what, "mount the same directory on every node, or use s3")


def clocks(survey: Survey, wanted: SoundnessSettings) -> Iterator[Finding]:
    """Do all clocks agree? Leases and reports compare their times."""
    if not survey.clocks:
        return
    middle = statistics.median_low(ahead for ahead, _ in survey.clocks.values())
    for node, (ahead, uncertain) in survey.clocks.items():
        skew = ahead - middle
        if abs(skew) - uncertain <= wanted.max_clock_skew_s:
            continue
        if len(survey.clocks) == 2:
            what = f"the clocks of {' and '.join(survey.clocks)} are {abs(skew):.1f} s apart"
            yield Finding("fault", "cluster", what, "set both by NTP (chrony, systemd-timesyncd)")
        else:
            way = "ahead of" if skew > 0 else "behind"
            what = f"its clock is {abs(skew):.1f} s {way} the others"
            yield Finding("fault", node, what, "set it by NTP (chrony, systemd-timesyncd)")


def links(survey: Survey, wanted: SoundnessSettings) -> Iterator[Finding]:
    """Do all nodes reach each other, fast enough?"""
    ways = "open all TCP ports between the nodes: workers meet on ports that the system chooses"
    for link in survey.links:
        if link.problem:
            what = f"cannot be reached from {link.source} ({link.problem})"
            yield Finding("fault", link.target, what, ways)
    measured = [link for link in survey.links if not link.problem]
    if not measured:
        return
    # The upper quartile: of four nodes, one with a slow link spoils half of all links.
    usual = sorted(link.bandwidth for link in measured)[len(measured) * 3 // 4]
    bar = max(wanted.min_bandwidth_mbit * MEGABIT, SLOW_LINK * usual)
    slow = [link for link in measured if link.bandwidth < bar]
    if len(slow) == len(measured) > 2:
        worst = min(slow, key=lambda link: link.bandwidth)
        what = f"all links are slow: {worst.bandwidth / MEGABIT:,.0f} Mbit/s and more"
        remedy = (
            f"choose other interfaces, or lower --min_bandwidth_mbit={wanted.min_bandwidth_mbit:g}"
        )
        yield Finding("fault", "cluster", what, remedy)
        slow = []
    for node, those in by_culprit(slow).items():
        worst = min(those, key=lambda link: link.bandwidth)
        speed = f"{worst.bandwidth / MEGABIT:,.0f} Mbit/s from {worst.source} to {worst.target}"
        what = f"slow link: {speed}; the others have {usual / MEGABIT:,.0f}"
        remedy = "see its cable, port and interface (ethtool); every step waits for the slowest"
        level: Literal["fault", "warning"] = (
            "fault" if worst.bandwidth < wanted.min_bandwidth_mbit * MEGABIT else "warning"
        )
        yield Finding(level, node, what, remedy)
    for link in measured:
        if link.latency > wanted.max_latency_ms / 1000:
            what = f"{1000 * link.latency:.1f} ms to {link.target} and back"
            yield Finding("warning", link.source, what, "place the nodes closer to each other")
    if survey.network_problem:
        what = f"an all-reduce of all nodes failed ({survey.network_problem})"
        yield Finding("fault", "cluster", what, "see interfaces, names and ports above")


def by_culprit(slow: Sequence[Link]) -> dict[str, list[Link]]:
    """Return slow links by the node that most of them have in common."""
    found: dict[str, list[Link]] = {}
    left = list(slow)
    while left:
        ends = Counter(end for link in left for end in (link.source, link.target))
        node, _ = ends.most_common(1)[0]
        found[node] = [link for link in left if node in (link.source, link.target)]
        left = [link for link in left if link not in found[node]]
    return found


def interfaces(survey: Survey) -> Iterator[Finding]:
    """Will collectives take the interface that Ray takes?"""
    for name, node in survey.nodes.items():
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            choice = node.choices.get(variable, "")
            if choice and not is_known(choice, node.interfaces, variable == "GLOO_SOCKET_IFNAME"):
                have = ", ".join(node.interfaces)
                what = f"{variable}={choice}: no such interface; there are {have}"
                yield Finding("fault", name, what, "correct or unset it")
        if not node.interface and "interfaces" not in node.problems:
            what = f"no interface has {node.address}, the address that it joined with"
            yield Finding("fault", name, what, "ray start --node-ip-address=ITS_ADDRESS")
        if len(survey.nodes) > 1 and node.address.startswith("127."):
            what = f"joined as {node.address}, which no other node reaches"
            yield Finding("fault", name, what, "ray start --node-ip-address=ITS_ADDRESS")


def is_known(choice: str, interfaces: Sequence[str], exactly: bool) -> bool:
    """Tell whether what a variable names is there; NCCL takes beginnings, =NAME and ^NAME too."""
    if choice.startswith("^"):
        return True
    if exactly or choice.startswith("="):
        return all(part in interfaces for part in choice.lstrip("=").split(","))
    return any(one.startswith(part) for part in choice.split(",") for one in interfaces)


def security(survey: Survey) -> Iterator[Finding]:
    """Does Ray ask for its token? Who runs jobs runs code. And is a stopped job waited for?"""
    head = survey.head
    if not survey.is_shared or head.name not in survey.nodes:
        return
    status = head.jobs_status
    is_answer = status is not None and (200 <= status < 300 or status in REFUSED)
    if status is not None and not is_answer:
        what = f"the jobs API does not answer{f' (HTTP {status})' * bool(status)}"
        yield Finding("fault", head.name, what, "see dashboard.log among Ray's logs there")
    if (status not in REFUSED) if is_answer else not head.token_mode:
        what = "token authentication is off: whoever reaches Ray's ports runs code there"
        remedy = "RAY_AUTH_MODE=token before `ray start` on every node, and ~/.ray/auth_token, 0600"
        yield Finding("fault", head.name, what, remedy)
    if head.seen_by and not head.is_pod:
        what = f"the dashboard can be reached from {', '.join(head.seen_by)}"
        yield Finding("warning", head.name, what, "ray start --dashboard-host=127.0.0.1")
    if (head.stop_wait or 0.0) < 30:
        have = "not set: 3 s" if head.stop_wait is None else f"{head.stop_wait:g} s"
        what = f"RAY_JOB_STOP_WAIT_TIME_S: {have}; a stopped job needs time for its checkpoint"
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
            if gpu.used > 0.1 * gpu.memory or (gpu.busy or 0.0) > BUSY_GPU:
                what = f"GPU {index}: {gpu.used / GIGABYTE:.1f} GB used, {gpu.busy or 0:.0f}% busy"
                yield Finding("warning", name, what, "end what runs there, or start after it")


def idleness(survey: Survey) -> Iterator[Finding]:
    """Are the nodes idle, as they should be before a run?"""
    for name, node in survey.nodes.items():
        cores = node.machine_cores or node.cores  # the load is the machine's
        if node.cores and node.load > BUSY * cores + 1:
            what = f"load {node.load:.1f} on {cores} cores, although nothing trains yet"
            yield Finding("warning", name, what, "see `top` there")


def parts(survey: Survey) -> Iterator[Finding]:
    """Could all of it be found out?"""
    of_nodes = (
        (name, part, why)
        for name, node in survey.nodes.items()
        for part, why in node.problems.items()
    )
    for where, part, why in (*of_nodes, *survey.problems):
        remedy = "see Ray's logs there"
        if "ImportError" in why or "ModuleNotFound" in why:
            remedy = f"install the project there as on the others; {remedy}"
        yield Finding("fault", where, f"its {part} could not be examined ({why})", remedy)
