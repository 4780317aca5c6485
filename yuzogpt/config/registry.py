"""Registries: implementations by name, and the settings whose values are these names.

    ACTIVATIONS = Registry[Callable[[Tensor], Tensor]]("activation")

    @ACTIVATIONS.register("gelu", help="GPT-2's: the tanh approximation")
    def gelu(x: Tensor) -> Tensor: ...

    activation: Annotated[str, OneOf("yuzogpt.model.layers:ACTIVATIONS")] = setting("gelu", ...)

A registration is all that a new value needs: its choices, its help and its page follow. A registry
is in the room of its implementations, which config does not import. Until a command imports that
room, names and help are read from its source: importing torch would take seconds.
"""

import ast
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

from pydantic import GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from yuzogpt.errors import nearest

ROOT = Path(__file__).parents[2]
TASKS = "yuzogpt.evaluation.benchmarks.tasks:TASKS"  # two verbs have settings of it

T = TypeVar("T")
Entry = Mapping[str, Any]  # what a value is registered with: `help`, and traits


class Registry(Mapping[str, T], Generic[T]):
    """Implementations of one kind by name, in the order of their registration."""

    def __init__(self, kind: str, *traits: str) -> None:
        """`kind`: what its values are, for messages; `traits`: what some of them are beside."""
        self.kind, self.traits = kind, traits
        self.entries: dict[str, Entry] = {}
        self._implementations: dict[str, T] = {}

    def register(self, name: str, *, help: str, **traits: bool) -> Callable[[T], T]:
        """Return the decorator of the implementation of `name`; arguments must be literals.

        TypeError if it leaves an abstract method out, ValueError if the name is taken or a trait
        is unknown.
        """
        if name in self.entries:
            raise ValueError(f"{self.kind} {name}: registered twice")
        if unknown := set(traits) - set(self.traits):
            raise ValueError(f"{self.kind} {name}: unknown traits {', '.join(sorted(unknown))}")

        def add(implementation: T) -> T:
            missing = sorted(getattr(implementation, "__abstractmethods__", ()))
            if missing or implementation is None:
                raise TypeError(f"{self.kind} {name}: not implemented {', '.join(missing)}")
            self.entries[name] = {"help": help, **traits}
            self._implementations[name] = implementation
            return implementation

        return add

    def has(self, name: str, trait: str) -> bool:
        """Return whether a value was registered with a trait."""
        return bool(self.entries[name].get(trait))

    def __getitem__(self, name: str) -> T:
        return self._implementations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._implementations)

    def __len__(self) -> int:
        return len(self._implementations)


@dataclass(frozen=True)
class OneOf:
    """Marks a setting, one name or several, whose values are the names in a registry."""

    registry: str  # module:NAME
    others: tuple[tuple[str, str], ...] = ()  # values that are not in the registry, with their help
    is_open: bool = False  # a name of the user's own is a value, too

    def entries(self) -> dict[str, Entry]:
        """Return the values, with what they are registered with."""
        module, _, name = self.registry.partition(":")
        loaded = getattr(sys.modules.get(module), name, None)
        registered = loaded.entries if loaded else read_entries(module, name)
        return {name: {"help": text} for name, text in self.others} | registered

    def check(self, value: T) -> T:
        """Return the value; ValueError if it is not registered."""
        if self.is_open:
            return value
        entries = self.entries()
        for name in value if isinstance(value, tuple) else (value,):
            if name not in entries:
                hint = nearest(str(name), entries) or f"known: {', '.join(filter(None, entries))}"
                raise ValueError(f"no {name!r}; {hint}")
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


@functools.cache
def read_entries(module: str, registry: str) -> dict[str, Entry]:
    """Return the entries of a registry from the source of its module."""
    tree = ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text("utf-8"))
    return {
        ast.literal_eval(node.args[0]): {
            str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords
        }
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{registry}.register"
    }


def values_of(field: FieldInfo) -> dict[str, str]:
    """Return the values that a setting lists, with their help; none if it does not list them."""
    for item in field.metadata:
        if isinstance(item, OneOf):
            return {name: entry["help"] for name, entry in item.entries().items()}
    listed = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return dict.fromkeys(map(str, listed), "")


def has_trait(section: Any, leaf: str, trait: str) -> bool:
    """Return whether the value of a section's setting is registered with a trait."""
    (one_of,) = (m for m in type(section).model_fields[leaf].metadata if isinstance(m, OneOf))
    return bool(one_of.entries()[getattr(section, leaf)].get(trait))
