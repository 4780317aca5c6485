"""Prints what the doctor found: a table of nodes, a table of links, the findings and a verdict."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from yuzogpt.console import terminal
from yuzogpt.doctor.findings import GIGABYTE, MEGABIT, Finding
from yuzogpt.doctor.node import Node
from yuzogpt.doctor.survey import Survey

STYLES = {"fault": "bold red", "warning": "yellow"}
WIDTH = 160  # columns, if stdout is no terminal
MAX_NODES_OF_LINKS = 8  # of more nodes, the table of links is not shown


def show(survey: Survey, findings: Sequence[Finding]) -> None:
    console = terminal.console(WIDTH)
    console.print(nodes_table(survey))
    if survey.links and len(survey.nodes) <= MAX_NODES_OF_LINKS:
        console.print(links_table(survey))
    if survey.network:
        latency, bandwidth = 1000 * survey.network.latency, survey.network.bandwidth / MEGABIT
        text = f"all-reduce of all nodes: {latency:.2f} ms, {bandwidth:,.0f} Mbit/s from each"
        console.print(Text(text))
        console.print()
    for finding in findings:
        line = Text(f"{finding.level:<8}", style=STYLES[finding.level])
        line.append(f"{finding.where}: {finding.what}", style="default")
        console.print(line)
        console.print(Text(f"         {finding.remedy}", style="dim"))
    console.print(Text(verdict(survey, findings), style="bold"))


def verdict(survey: Survey, findings: Sequence[Finding]) -> str:
    """Return the verdict in one line."""
    faults = sum(finding.level == "fault" for finding in findings)
    warnings = len(findings) - faults
    count = len(survey.nodes) + len(survey.silent)
    extra = f", {warnings} warning(s)" if warnings else ""
    return f"{count} node(s): {f'{faults} fault(s)' if faults else 'sound'}{extra}"


def nodes_table(survey: Survey) -> Table:
    """Return one row a node."""
    columns = ("node", "address", "interface", "python", "torch", "ray")
    numeric = ("cores", "load", "GPUs", "memory GB", "disk GB", "storage MB/s", "clock s")
    rows = [node_row(survey, name, node) for name, node in survey.nodes.items()]
    rows += [[name, *"?" * (len(columns) + len(numeric) - 1)] for name in survey.silent]
    return terminal.table([*columns, *numeric], rows, numeric=numeric)


def node_row(survey: Survey, name: str, node: Node) -> list[str]:
    """Return a node's cells."""
    mark = " (head)" if name == survey.head.name else ""
    storage = survey.storage.get(name)
    clock = survey.clocks.get(name)
    return [
        name + mark, node.address, node.interface or "?",
        *(node.versions.get(package, "none") for package in ("python", "torch", "ray")),
        *known(node, {
            "cores": core_count(node), "load": f"{node.load:.1f}", "GPUs": str(len(node.gpus)),
            "memory": f"{node.memory / GIGABYTE:.1f}",
            "disk": f"{node.temporary / GIGABYTE:.1f}",
        }),
        f"{storage.written / 1e6:.0f}" if storage and storage.written else "-",
        f"{clock[0]:+.2f}" if clock else "-",
    ]  # fmt: skip


def known(node: Node, cells: dict[str, str]) -> list[str]:
    """Return the cells by the part of a node that they show; "?" for parts that failed."""
    return ["?" if part in node.problems else cell for part, cell in cells.items()]


def core_count(node: Node) -> str:
    """Return how many cores a node may use, and of how many if a limit leaves less."""
    if node.quota < node.machine_cores:
        return f"{node.quota:g} of {node.machine_cores}"
    return str(node.cores)


def links_table(survey: Survey) -> Table:
    """Return the bandwidths from each node (row) to each other (column)."""
    names = list(survey.nodes)
    links = {(link.source, link.target): link for link in survey.links}

    def cell(source: str, target: str) -> str:
        link = links.get((source, target))
        if link is None:
            return "-"
        return "closed" if link.problem else f"{link.bandwidth / MEGABIT:,.0f}"

    rows = [[source, *(cell(source, target) for target in names)] for source in names]
    return terminal.table(["", *names], rows, numeric=names, title="Mbit/s, from row to column")


def to_json(survey: Survey, findings: Sequence[Finding]) -> str:
    """Return survey and findings as one JSON object, whose `verdict` is sound or faulty."""
    is_faulty = any(finding.level == "fault" for finding in findings)
    content: dict[str, Any] = {
        "verdict": "faulty" if is_faulty else "sound",
        "findings": [asdict(finding) for finding in findings],
        **asdict(survey),
    }
    return json.dumps(content, indent=2)
