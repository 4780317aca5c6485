"""Chooses device, dtype, compilation and threads; resolves every `auto`, with a reason to print."""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from yuzogpt.config import DeviceSettings
from yuzogpt.errors import UserError
from yuzogpt.runtime.cores import threads_of_each, total_memory
from yuzogpt.runtime.torch_internals import cpu_has_bfloat16
from yuzogpt.runtime.world import World
from yuzogpt.storage.atomic_files import cache_directory

CPU_HAS_BFLOAT16 = cpu_has_bfloat16()


@dataclass(frozen=True)
class Hardware:
    """The device and how it computes, with the reasons in words for the user."""

    device: torch.device
    autocast_dtype: torch.dtype | None  # None: float32 throughout
    compile: bool
    threads: int
    reasons: tuple[str, ...]

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device, without waiting if that is a GPU."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context for forward passes."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)


def choose_hardware(
    settings: DeviceSettings, world: World, compile_wanted: bool | str = False
) -> Hardware:
    """Resolve every `auto`, set the threads of this process, and return the choice."""
    device = choose_device(settings.device, world)
    autocast, dtype_reason = choose_dtype(settings.dtype, device)
    compiled, compile_reason = choose_compile(compile_wanted, device)
    threads = settings.threads or threads_of_each(world.local_size)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = True  # GPUs only; CPUs compute in full float32
    return Hardware(device, autocast, compiled, threads, (dtype_reason, compile_reason))


def choose_device(name: str, world: World) -> torch.device:
    """Return this rank's device."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and world.size == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device=cuda: torch finds no CUDA device here; use --device=cpu")
        index = min(world.local_rank, torch.cuda.device_count() - 1)
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        return device
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps: torch finds no Apple GPU here; use --device=cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """Return the autocast dtype (None: float32), and the reason."""
    if name != "auto":
        tf32 = " (TF32 in matrix products)" if (device.type, name) == ("cuda", "float32") else ""
        return (torch.bfloat16 if name == "bfloat16" else None), f"dtype {name}, as asked{tf32}"
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = device.type == "cpu" and CPU_HAS_BFLOAT16
    if has_bfloat16:
        return torch.bfloat16, "dtype bfloat16 (autocast): the hardware has it"
    return None, f"dtype float32: this {device.type} has no bfloat16 arithmetic"


def choose_compile(wanted: bool | str, device: torch.device) -> tuple[bool, str]:
    """Return whether to use torch.compile, and the reason."""
    if wanted is False:
        return False, "compile False, as asked"
    if (wanted is True or device.type == "cuda") and (missing := missing_compiler(device)):
        return False, f"compile off: there is no {missing}; install one"
    if wanted is True:
        return True, "compile True, as asked"
    if device.type != "cuda":
        return False, f"compile off: on {device.type} it must be asked for (--compile=True)"
    try:
        import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    except ImportError:
        return False, "compile off: triton is not installed"
    return True, "compile on: CUDA with triton"


def missing_compiler(device: torch.device) -> str:
    """Return the compiler that torch.compile needs and that is missing here; empty: none.

    Triton needs a C compiler for its launchers, inductor a C++ compiler for kernels of CPUs.
    """
    if device.type == "cuda":
        named = os.environ.get("CC")
        found = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
        return "" if found else f"C compiler ({named or 'gcc or clang'})"
    usual = "clang++" if sys.platform == "darwin" else "g++"
    name = os.environ.get("CXX") or usual
    return "" if shutil.which(name) else f"C++ compiler ({name})"


def keep_compiled_code_private() -> None:
    """Make torch.compile keep its code in this user's cache.

    By default it runs code from a folder in the shared temporary directory, whose name any user
    can guess, and create first.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    try:
        directory = cache_directory() / "compiled"
        directory.mkdir(mode=0o700, exist_ok=True)
    except (OSError, UserError):  # no home directory, or not writable
        directory = Path(tempfile.mkdtemp(prefix="yuzogpt-compiled-"))  # mode 0700
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)


def device_memory(device: torch.device) -> int:
    """Return the total memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return total_memory()
