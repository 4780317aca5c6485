"""What the user sees: a table of nodes, a table of links, what is wrong, and a verdict.

In: a survey and the findings. Out: text by rich, or one JSON object.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from yuzogpt.console import terminal
from yuzogpt.doctor.findings import GIGABYTE, MEGABIT, Finding
from yuzogpt.doctor.node import Node
from yuzogpt.doctor.survey import Survey

STYLES = {"fault": "bold red", "warning": "yellow"}
WIDE = 160  # columns
MOST_LINKS = 8  # nodes, up to which all links are shown


def show(survey: Survey, findings: Sequence[Finding]) -> None:
    """Print all of it."""
    console = terminal.console(WIDE)
    console.print(nodes_table(survey))
    if survey.links and len(survey.nodes) <= MOST_LINKS:
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
    """Return one line."""
    faults = sum(finding.level == "fault" for finding in findings)
    warnings = len(findings) - faults
    count = len(survey.nodes) + len(survey.silent)
    extra = f", {warnings} warning(s)" if warnings else ""
    return f"{count} node(s): {f'{faults} fault(s)' if faults else 'sound'}{extra}"


def nodes_table(survey: Survey) -> Table:
    """Return one row a node."""
    columns = ("node", "address", "interface", "python", "torch", "ray", "cores", "load")
    more = ("GPUs", "memory GB", "disk GB", "storage MB/s", "clock s")
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in (*columns, *more):
        is_number = name in ("cores", "load", "GPUs", *more)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for name, node in survey.nodes.items():
        mark = " (head)" if name == survey.head.name else ""
        stored = survey.storage.get(name)
        ahead = survey.clocks.get(name)
        cells = (
            name + mark, node.address, node.interface or "?",
            *(node.versions.get(what, "none") for what in ("python", "torch", "ray")),
            *known(node, {
                "cores": cores_of(node), "load": f"{node.load:.1f}", "GPUs": str(len(node.gpus)),
                "memory": f"{node.memory / GIGABYTE:.1f}",
                "disk": f"{node.temporary / GIGABYTE:.1f}",
            }),
            f"{stored.written / 1e6:.0f}" if stored and stored.written else "-",
            f"{ahead[0]:+.2f}" if ahead else "-",
        )  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    for name in survey.silent:
        table.add_row(Text(name), *(Text("?") for _ in range(len(columns) + len(more) - 1)))
    return table


def known(node: Node, cells: dict[str, str]) -> list[str]:
    """Return the cells of the parts of a node that were found out, "?" for the others."""
    return ["?" if part in node.problems else cell for part, cell in cells.items()]


def cores_of(node: Node) -> str:
    """Return how many cores a node may use, and of how many, if a limit leaves less."""
    if node.quota < node.machine_cores:
        return f"{node.quota:g} of {node.machine_cores}"
    return str(node.cores)


def links_table(survey: Survey) -> Table:
    """Return the bandwidths from each node (row) to each other (column)."""
    names = list(survey.nodes)
    found = {(link.source, link.target): link for link in survey.links}
    table = Table(box=SIMPLE_HEAD, show_edge=False, title="Mbit/s, from row to column")
    table.title_justify = "left"
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for source in names:
        cells = [Text(source)]
        for target in names:
            link = found.get((source, target))
            text = "-" if link is None else f"{link.bandwidth / MEGABIT:,.0f}"
            cells.append(Text("closed" if link and link.problem else text))
        table.add_row(*cells)
    return table


def to_json(survey: Survey, findings: Sequence[Finding]) -> str:
    """Return all of it as one JSON object, of which `verdict` is sound or faulty."""
    is_faulty = any(finding.level == "fault" for finding in findings)
    whole: dict[str, Any] = {
        "verdict": "faulty" if is_faulty else "sound",
        "findings": [asdict(finding) for finding in findings],
        **asdict(survey),
    }
    return json.dumps(whole, indent=2)
