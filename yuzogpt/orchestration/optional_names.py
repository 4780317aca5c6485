"""Names that a library may lack: looked up where they are used, and replaced for a while.

ray_internals.py has those of Ray.
"""

import contextlib
import os
from collections.abc import Iterator
from importlib import import_module
from inspect import isfunction, unwrap
from typing import Any, NamedTuple

WITHOUT = "YUZOGPT_WITHOUT_RAY_INTERNALS"
MISSING = object()


class Feature(NamedTuple):
    """What some private names are used for, and what is lost without any of them."""

    use: str
    loss: str
    names: tuple[str, ...]  # module:attribute.attribute; also a dataclass's field, or a parameter
    overrides: tuple[str, ...] = ()  # ours in Ray's place, in orchestration/; unused without them


def is_left_out(name: str) -> bool:
    """Return whether the user asked to do without a name."""
    return bool({"all", name} & set(os.environ.get(WITHOUT, "").split(",")))


def resolve(name: str) -> Any:
    """Return what a name refers to, or MISSING."""
    if is_left_out(name):
        return MISSING
    module, _, attributes = name.partition(":")
    try:
        value = import_module(module)
    except ImportError:
        return MISSING
    for attribute in filter(None, attributes.split(".")):
        value = member(value, attribute)
        if value is MISSING:
            break
    return value


def member(owner: Any, name: str) -> Any:
    """Return an attribute of an object, a field of a dataclass, or a parameter of a function."""
    if hasattr(owner, name):
        return getattr(owner, name)
    if isfunction(owner):
        # `ray.init` takes its private ones out of **kwargs, into variables of the same names.
        return name if name in unwrap(owner).__code__.co_varnames else MISSING
    return getattr(owner, "__dataclass_fields__", {}).get(name, MISSING)


@contextlib.contextmanager
def replaced(name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a class in this context, if this Ray has it."""
    before = resolve(name)
    owner_name, _, attribute = name.rpartition(".")
    if before is MISSING:
        yield
        return
    owner = resolve(owner_name)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


def do_nothing(*_: Any, **__: Any) -> None:
    """Stand in for what a single node does not need."""
