"""From a survey to what is wrong: each fault is found, named, and the only one."""

import dataclasses

import pytest

from yuzogpt.config import SoundnessSettings
from yuzogpt.doctor.display import core_count
from yuzogpt.doctor.findings import diagnose
from yuzogpt.doctor.links import Link
from yuzogpt.doctor.node import Gpu, Node, Storage
from yuzogpt.doctor.survey import Head, Survey

WANTED = SoundnessSettings(num_nodes=4, storage="/shared")
NAMES = ("head", "a", "b", "c")


def sound():
    """A survey of four nodes without a fault."""
    nodes = {
        name: Node(
            address=f"10.0.0.{number}",
            versions={"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0", "cuda": "12.8"},
            cores=8,
            load=0.3,
            memory=64 * 10**9,
            temporary=200 * 10**9,
            interface="eth0",
            interfaces=["lo", "eth0"],
            choices={},
            gpus=[Gpu("H100", 80 * 10**9, 10**9, 0.0, 0)],
            usable_gpus=1,
            counted_gpus=1,
        )
        for number, name in enumerate(NAMES)
    }
    return Survey(
        nodes=nodes,
        clocks={name: (0.01 * number, 0.002) for number, name in enumerate(NAMES)},
        storage={name: Storage(written=500e6, free=10**12) for name in NAMES},
        unseen={name: [] for name in NAMES},
        links=[Link(a, b, 1e-4, 9e9) for a in NAMES for b in NAMES if a != b],
        head=Head("head", jobs_status=401, token_mode=True, stop_wait=60.0),
        is_shared=True,
    )


def change(survey, name, **changes):
    """Change facts of a node."""
    survey.nodes[name] = dataclasses.replace(survey.nodes[name], **changes)


def change_versions(survey, name, **versions):
    change(survey, name, versions={**survey.nodes[name].versions, **versions})


def change_links(survey, is_meant, **changes):
    survey.links = [
        dataclasses.replace(link, **changes) if is_meant(link) else link for link in survey.links
    ]


def test_a_sound_cluster_has_no_findings():
    assert diagnose(sound(), WANTED) == []


FAULTS = {
    "another torch": (
        lambda s: change_versions(s, "b", torch="2.10.0"), "b", "torch 2.10.0, where others have"
    ),
    "a node is missing": (lambda s: s.nodes.pop("c"), "cluster", "3 of 4 nodes"),
    "a node is silent": (
        lambda s: (s.nodes.pop("c"), s.silent.update(c="not within 30 s")), "c", "does not answer"
    ),
    "no memory": (lambda s: change(s, "a", memory=10**9), "a", "memory: 1.0 GB free"),
    "no disk": (lambda s: change(s, "a", temporary=10**9), "a", "Ray's files: 1.0 GB free"),
    "storage is full": (
        lambda s: s.storage.update(a=Storage(5e8, 10**9)), "a", "/shared: 1.0 GB free"
    ),
    "storage is read-only": (
        lambda s: s.storage.update(a=Storage(problem="Read-only file system")),
        "a",
        "cannot be written (Read-only file system)",
    ),
    "storage is not shared": (
        lambda s: s.unseen.update(a=["b", "c"]), "a", "what b, c wrote is not there"
    ),
    "a clock is ahead": (lambda s: s.clocks.update(c=(90.0, 0.1)), "c", "90.0 s ahead of"),
    "a clock is behind": (lambda s: s.clocks.update(c=(-3.0, 0.1)), "c", "3.0 s behind"),
    "a closed port": (
        lambda s: change_links(
            s, lambda link: (link.source, link.target) == ("a", "b"), problem="port 4711: no answer"
        ),
        "b",
        "cannot be reached from a (port 4711",
    ),
    "a slow node": (
        lambda s: change_links(s, lambda link: "c" in (link.source, link.target), bandwidth=1e7),
        "c",
        "slow link: 10 Mbit/s",
    ),
    "no such interface": (
        lambda s: change(s, "b", choices={"NCCL_SOCKET_IFNAME": "ib0"}), "b", "no such interface"
    ),
    "the loopback": (lambda s: change(s, "b", address="127.0.0.1"), "b", "joined as 127.0.0.1"),
    "no token": (
        lambda s: setattr(s.head, "jobs_status", 200), "head", "token authentication is off"
    ),
    "no token, and no dashboard": (
        lambda s: (setattr(s.head, "jobs_status", None), setattr(s.head, "token_mode", False)),
        "head",
        "token authentication is off",
    ),
    "a GPU fell off its bus": (
        lambda s: change(s, "a", counted_gpus=2), "a", "nvidia-smi finds 1 of the 2 GPUs"
    ),
    "a GPU driver that hangs": (
        lambda s: change(s, "a", gpus=[], gpu_problem="nvidia-smi does not answer within 10 s"),
        "a",
        "nvidia-smi does not answer",
    ),
    "a torch without CUDA": (
        lambda s: change(s, "a", usable_gpus=0), "a", "torch can use 0 of its 1 GPUs"
    ),
    "a dead jobs API": (
        lambda s: setattr(s.head, "jobs_status", 0), "head", "the jobs API does not answer"
    ),
    "a broken jobs API": (
        lambda s: setattr(s.head, "jobs_status", 500), "head", "not answer (HTTP 500)"
    ),
    "an address of nobody": (
        lambda s: change(s, "b", interface=""), "b", "no interface has 10.0.0.2"
    ),
    "only slow links": (
        lambda s: change_links(s, lambda link: True, bandwidth=1e8),
        "cluster",
        "all links are slow: 100 Mbit/s",
    ),
    "storage hangs": (
        lambda s: s.storage.update(a=Storage(problem="no answer within 30 s")),
        "a",
        "/shared cannot be written (no answer",
    ),
    "a part that a node cannot find out": (
        lambda s: change(s, "a", memory=0, problems={"memory": "OSError: no"}),
        "a",
        "its memory could not be examined (OSError: no)",
    ),
    "a part of the examination": (
        lambda s: s.problems.append(("cluster", "links", "KeyError: 'b'")),
        "cluster",
        "its links could not be examined (KeyError: 'b')",
    ),
    "memory errors": (
        lambda s: change(s, "a", gpus=[Gpu("H100", 80 * 10**9, 0, 0.0, 2)]), "a", "2 memory errors"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name):
    break_it, where, what = FAULTS[name]
    survey = sound()
    break_it(survey)
    (found,) = diagnose(survey, WANTED)
    assert (found.level, found.where) == ("fault", where)
    assert what in found.what
    assert found.remedy


WARNINGS = {
    "a link below a quarter of the others": (
        lambda s: change_links(s, lambda link: "c" in (link.source, link.target), bandwidth=2e9),
        "c",
    ),
    "far away": (
        lambda s: change_links(
            s, lambda link: (link.source, link.target) == ("a", "b"), latency=0.05
        ),
        "a",
    ),
    "an open dashboard": (lambda s: s.head.seen_by.append("b"), "head"),
    "no time to stop": (lambda s: setattr(s.head, "stop_wait", None), "head"),
    "a busy node": (lambda s: change(s, "a", load=7.5), "a"),
    "a busy GPU": (
        lambda s: change(s, "a", gpus=[Gpu("H100", 80 * 10**9, 60 * 10**9, 99.0, 0)]), "a"
    ),
    "slow storage": (lambda s: s.storage.update(a=Storage(1e6, 10**12)), "a"),
    "a GPU that Ray does not count": (lambda s: change(s, "a", counted_gpus=0), "a"),
    "a remark of nvidia-smi's": (
        lambda s: change(s, "b", gpu_remarks=["WARNING: infoROM is corrupted at gpu 0000:3B"]), "b"
    ),
    "another driver": (lambda s: change_versions(s, "b", driver="550"), "b"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNINGS)
def test_what_makes_it_slow_is_a_warning(name):
    break_it, where = WARNINGS[name]
    survey = sound()
    for node in NAMES:
        change_versions(survey, node, driver="570")
    break_it(survey)
    assert [(found.level, found.where) for found in diagnose(survey, WANTED)] == [
        ("warning", where)
    ]


def test_of_two_clocks_none_is_called_right():
    survey = sound()
    survey.clocks = {"a": (0.0, 0.01), "b": (1.9, 0.01)}
    (found,) = diagnose(survey, WANTED)
    assert (found.where, found.what) == ("cluster", "the clocks of a and b are 1.9 s apart")


def test_a_head_alone_is_not_the_cluster():
    survey = sound()
    for name in ("a", "b", "c"):
        del survey.nodes[name], survey.clocks[name], survey.storage[name], survey.unseen[name]
    survey.links = []
    survey.head.takes_work = False
    wanted = WANTED.model_copy(update={"num_nodes": 0})
    (found,) = diagnose(survey, wanted)
    assert (found.level, found.where) == ("warning", "cluster")
    assert "only the head has joined" in found.what


@pytest.mark.parametrize(
    ("why", "remedy"),
    [
        ("not within 40 s", "open all TCP ports"),
        ("ModuleNotFoundError: No module named 'torch'", "install the project there"),
        ("The actor is dead because its worker process has died", "see Ray's logs there"),
    ],
)
def test_what_to_do_about_a_silent_node_depends_on_why(why, remedy):
    survey = sound()
    survey.silent["c"] = why
    del survey.nodes["c"]
    (found,) = diagnose(survey, WANTED)
    assert found.remedy.startswith(remedy)


def test_a_head_that_does_not_answer_is_not_called_open():
    survey = sound()
    del survey.nodes["head"]
    survey.silent["head"], survey.head = "not within 40 s", Head("head")
    assert [found.what for found in diagnose(survey, WANTED)] == [
        "does not answer (not within 40 s)"
    ]


@pytest.mark.parametrize("choice", ["^docker0", "eth", "=eth0", "eth0,ib0"])
def test_nccls_ways_to_choose_an_interface_are_known(choice):
    survey = sound()
    change(survey, "b", choices={"NCCL_SOCKET_IFNAME": choice})
    assert diagnose(survey, WANTED) == []


def test_faults_come_first():
    survey = sound()
    change(survey, "a", load=7.5)
    survey.storage["b"] = Storage(problem="Permission denied")
    assert [found.level for found in diagnose(survey, WANTED)] == ["fault", "warning"]


def test_a_ray_of_ones_own_needs_no_lock():
    survey = sound()
    survey.is_shared, survey.head = False, Head("head")
    assert diagnose(survey, WANTED) == []


def test_a_containers_cores_are_shown_and_the_load_is_its_machines():
    survey = sound()
    change(survey, "a", cores=1, quota=0.5, machine_cores=64, load=20.0)
    assert not diagnose(survey, WANTED)
    assert core_count(survey.nodes["a"]) == "0.5 of 64"
    change(survey, "a", cores=8, quota=8.0, machine_cores=8, load=0.0)
    assert core_count(survey.nodes["a"]) == "8"
