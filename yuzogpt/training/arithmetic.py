"""How a run computes on CPUs: in float32 or bfloat16, with explicit or fused attention.

Which is faster depends on the CPU and on the shapes. So a new run measures its own (see
runtime/fastest.py). The choice is part of the run's state, because others give other last bits.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from yuzogpt.checkpoints.format import Arithmetic, Checkpoint, DtypeName
from yuzogpt.config import ModelSettings, TrainSettings
from yuzogpt.model.attention import MAX_EXPLICIT_TOKENS, prefers_explicit
from yuzogpt.model.dropout import row_keys
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initialize
from yuzogpt.runtime.device import CPU_HAS_BFLOAT16, Hardware
from yuzogpt.runtime.fastest import (
    Choice,
    Clock,
    cpu_name,
    full_key,
    measure,
    remember,
    remembered,
)
from yuzogpt.runtime.world import World

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}
MAX_FLOPS = 5e9  # of one measured pass: tens of milliseconds
MAX_ROW_FLOPS = 1e11  # of a row in one layer: a larger model is not measured
MAX_VOCAB = 1024  # of the measured model: its output matrix is one among many


def choose_arithmetic(
    settings: TrainSettings,
    world: World,
    hardware: Hardware,
    resume: Checkpoint | None,
    clock: Clock = time.perf_counter,
) -> tuple[Hardware, Arithmetic | None, str]:
    """Return the hardware with the chosen dtype, the choice, and a line about it.

    None on GPUs, where it is not chosen here. All ranks follow rank 0. A resumed run follows its
    own state. A dtype that the user asked for stays.
    """
    if hardware.device.type != "cpu":
        return hardware, None, ""
    device, shape = settings.device, settings.model
    recorded = resume.state.arithmetic if resume else None
    part = MeasuredPart(settings, world)
    if recorded and device.dtype in ("auto", recorded.dtype):
        arithmetic, line = recorded, line_of_resumed(recorded)
    elif not world.broadcast(  # of rank 0: a node without a compiler would decide otherwise
        resume is None
        and device.dtype == "auto"
        and device.autotune != "off"
        and not hardware.compile
        and part.layer_flops_of_row <= MAX_ROW_FLOPS
    ):
        return hardware, by_rule(shape, hardware.autocast_dtype), ""
    else:
        choice, is_new = measured(part, world, hardware, clock, device.autotune == "now")
        dtype, attention = choice.name.split()
        arithmetic = Arithmetic(dtype, attention, cpu_name())  # type: ignore[arg-type]
        line = line_of(choice, part, "" if is_new else ", measured before")
    autocast, reasons = AUTOCAST[arithmetic.dtype], (f"dtype {arithmetic.dtype}",)
    hardware = replace(hardware, autocast_dtype=autocast, reasons=reasons + hardware.reasons[1:])
    return hardware, arithmetic, line


def by_rule(shape: ModelSettings, autocast: torch.dtype | None) -> Arithmetic:
    """Return the choice for a dtype without a measurement."""
    dtype = autocast or torch.float32
    is_explicit = prefers_explicit(shape.block_size, torch.device("cpu"), dtype)
    name: DtypeName = "float32" if autocast is None else "bfloat16"
    return Arithmetic(name, "explicit" if is_explicit else "fused", cpu_name())


class MeasuredPart:
    """The part of a model and its micro-batch that is measured."""

    def __init__(self, settings: TrainSettings, world: World) -> None:
        shape = settings.model
        per_rank = math.ceil(settings.batch.global_rows / world.size)
        self.whole, self.whole_rows = shape, min(settings.batch.batch_size, per_rank)
        self.ranks = world.local_size
        T, C, vocab = shape.block_size, shape.n_embd, min(shape.vocab_size, MAX_VOCAB)
        head = 6 * T * C * vocab
        self.layer_flops_of_row = T * (6 * 12 * C * C + 12 * T * C)
        layers = int((MAX_FLOPS / self.whole_rows - head) // self.layer_flops_of_row)
        layers = min(max(1, layers), shape.n_layer)
        rows = int(MAX_FLOPS // (layers * self.layer_flops_of_row + head))
        self.rows = min(max(1, rows), self.whole_rows)
        self.shape = shape.model_copy(update={"n_layer": layers, "vocab_size": vocab})

    @property
    def names(self) -> list[str]:
        """Names of the candidates; dropout and long rows leave one kind of attention.

        A CPU without bfloat16 arithmetic emulates it, many times slower.
        """
        dtypes: tuple[DtypeName, ...] = (
            ("float32", "bfloat16") if CPU_HAS_BFLOAT16 else ("float32",)
        )
        shape = self.shape
        if shape.dropout:  # which needs explicit attention; without it, in evaluations: the rule
            rules = {name: by_rule(shape, AUTOCAST[name]).attention for name in dtypes}
            return [f"{name} {attention}" for name, attention in rules.items()]
        kinds = ["fused"] + ["explicit"] * (shape.block_size <= MAX_EXPLICIT_TOKENS)
        return [f"{name} {kind}" for name in dtypes for kind in kinds]

    def key(self, hardware: Hardware) -> dict[str, object]:
        """Return what a measurement depends on."""
        shape = {"model": self.whole.model_dump(mode="json"), "rows": self.whole_rows}
        return full_key("training step", hardware.threads, {**shape, "ranks": self.ranks})

    def candidates(self, hardware: Hardware) -> Mapping[str, Callable[[], object]]:
        """Return a forward and a backward pass of each kind."""
        with torch.device("meta"):
            model = GPT(self.shape)
        initialize(model.to_empty(device="cpu"), seed=0)
        shape = (self.rows, self.shape.block_size)
        ids = torch.arange(math.prod(shape)).remainder(self.shape.vocab_size).view(shape)
        keys = row_keys(0, 0, self.rows)

        def one_pass(name: str) -> None:
            dtype, attention = name.split()
            model.set_explicit_attention(attention == "explicit")
            with replace(hardware, autocast_dtype=AUTOCAST[dtype]).autocast():
                losses = model(ids, ids, keys)
            losses.sum().backward()
            model.zero_grad()

        return {name: lambda name=name: one_pass(name) for name in self.names}  # type: ignore[misc]

    def extent(self) -> str:
        """Return how much of a pass was measured; empty if all of it."""
        pairs = (
            (self.shape.n_layer, self.whole.n_layer, "layers"),
            (self.rows, self.whole_rows, "rows"),
        )
        parts = [f"{part} of {whole} {what}" for part, whole, what in pairs if part < whole]
        return f", {' and '.join(parts)}" if parts else ""


def measured(
    part: MeasuredPart, world: World, hardware: Hardware, clock: Clock, is_forced: bool
) -> tuple[Choice, bool]:
    """Return rank 0's choice, and whether it was measured now.

    The ranks measure at the same time, because they will compute at the same time.
    """
    key = part.key(hardware)
    known = None if is_forced or world.rank else remembered(key, part.names)
    if found := world.broadcast(known):
        return found, False
    rule = by_rule(part.whole, hardware.autocast_dtype)
    default = f"{rule.dtype} {rule.attention}"
    choice = world.broadcast(measure(key, part.candidates(hardware), default, clock))
    if world.rank == 0:
        remember(choice)
    return choice, True


def line_of(choice: Choice, part: MeasuredPart, when: str) -> str:
    """Return a line with the figures that decided."""
    names = sorted(choice.seconds, key=lambda name: (choice.seconds[name], name))
    names.sort(key=lambda name: name != choice.name)
    shown = dict.fromkeys(names, "")
    for name in names:
        dtype, attention = name.split()  # with dropout, attention is explicit in any case
        words = dtype if part.shape.dropout else f"{dtype}, {attention} attention"
        shown[name] = f"{words}: {1e3 * choice.seconds[name]:.1f}"
    first, *others = shown.values()
    line = f"arithmetic: {first} ms forward and backward{part.extent()}"
    disturbed = "" if choice.is_steady else "; disturbed by other programs, so the default is kept"
    return "; ".join([line, *others]) + when + disturbed


def line_of_resumed(recorded: Arithmetic) -> str:
    """Return a line about the choice of a resumed run."""
    line = f"arithmetic: {recorded.dtype}, {recorded.attention} attention, as this run began"
    if recorded.machine == (here := cpu_name()):
        return line
    return f"{line} on {recorded.machine}; nothing was measured on this {here}"
