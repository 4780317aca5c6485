"""The search space: which settings a sweep varies, and over which values.

It is read from `search:` in YAML files and from `--search.KEY=...`, with the settings' own keys:

    search:
      learning_rate: {loguniform: [1e-5, 1e-3]}
      dropout: {uniform: [0.0, 0.3]}
      weight_decay: {choice: [0.0, 0.01, 0.1]}
      beta2: {grid: [0.95, 0.99]}

Training accepts every value of a `Space`; Optuna's trials draw theirs from it.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import ValidationError

from yuzogpt.config import TrainSettings
from yuzogpt.config.resolve import (
    SEARCH,
    Override,
    TextLoader,
    check_renamed,
    find_key,
    leaves,
    load_yaml,
    read_mapping,
)
from yuzogpt.errors import UserError

if TYPE_CHECKING:
    import optuna

RANGES, LISTS = ("uniform", "loguniform"), ("choice", "grid")
SEARCHABLE = ("model", "initialization", "optimizer", "schedule", "finetuning", "guard")  # sections
# The same for all trials: else the longest would win, or losses would not compare.
NOT_SEARCHABLE = ("schedule.max_iters", "model.block_size", "model.vocab_size")
MAX_COMBINATIONS = 1000  # that are tried, to find one that a value is valid in

T = TypeVar("T", bound=TrainSettings)
Values = dict[str, Any]  # by `section.leaf`


@dataclass(frozen=True)
class Parameter:
    """One setting that varies."""

    key: str  # section.leaf
    kind: str  # uniform, loguniform: values are (low, high); choice, grid: values are all listed
    values: tuple[Any, ...]
    is_integer: bool = False

    @property
    def section(self) -> str:
        return self.key.partition(".")[0]

    @property
    def leaf(self) -> str:
        """The name without its section."""
        return self.key.partition(".")[2]

    def has(self, value: Any) -> bool:
        """Return True if a value can be drawn."""
        if self.kind in LISTS:
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    def distribution(self, *included: Any) -> "optuna.distributions.BaseDistribution":
        """Return Optuna's distribution, widened to the values in `included`."""
        from optuna import distributions

        if self.kind in LISTS:
            return distributions.CategoricalDistribution(
                tuple(dict.fromkeys((*self.values, *included)))
            )
        low, high = min((*self.values, *included)), max((*self.values, *included))
        kind = distributions.IntDistribution if self.is_integer else distributions.FloatDistribution
        return kind(low, high, log=self.kind == "loguniform" and low > 0)


@dataclass(frozen=True)
class Space:
    """All settings that vary."""

    parameters: tuple[Parameter, ...]

    def has(self, values: Values) -> bool:
        """Return True if the values can be drawn."""
        return all(p.has(values[p.key]) for p in self.parameters)

    def distributions(self) -> "dict[str, optuna.distributions.BaseDistribution]":
        """Return Optuna's distributions, by key."""
        return {p.key: p.distribution() for p in self.parameters}

    def defaults(self, settings: TrainSettings) -> Values:
        nested = settings.model_dump()
        return {p.key: nested[p.section][p.leaf] for p in self.parameters}

    def fitting(self, settings: TrainSettings, key: str, value: Any) -> Values:
        """Return a combination with this value that training accepts; UserError if none is.

        Of a range only its ends are tried; of more than 1000 combinations a random 1000.
        """
        others = [p for p in self.parameters if p.key != key]
        keys = [p.key for p in others]
        reason = None
        for drawn in combinations_of([p.values for p in others]):
            values = {key: value, **dict(zip(keys, drawn, strict=True))}
            try:
                with_values(settings, values)
            except UserError as error:
                reason = reason or error
            else:
                return values
        assert reason
        raise reason

    def grid(self) -> list[Values]:
        """Return every combination; UserError if one setting has a range."""
        for p in self.parameters:
            if p.kind not in LISTS:
                raise UserError(
                    f"search.{p.leaf}: {p.kind} is a range; --search_algorithm=grid needs choice "
                    "or grid"
                )
        keys = [p.key for p in self.parameters]
        combinations = itertools.product(*(p.values for p in self.parameters))
        return [dict(zip(keys, values, strict=True)) for values in combinations]

    def to_yaml(self) -> str:
        """Return a section of YAML that `read_space` reads back."""
        return yaml.safe_dump({SEARCH: self.describe()}, sort_keys=False)

    def describe(self) -> dict[str, dict[str, list[Any]]]:
        """Return the mapping that `read_space` reads."""
        return {p.key: {p.kind: list(p.values)} for p in self.parameters}


def combinations_of(lists: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Yield every choice of one value per list, or MAX_COMBINATIONS of them at random."""
    if math.prod(map(len, lists)) <= MAX_COMBINATIONS:
        yield from itertools.product(*lists)
        return
    generator = random.Random(0)
    for _ in range(MAX_COMBINATIONS):
        yield tuple(generator.choice(values) for values in lists)


def read_space(settings: TrainSettings, files: Sequence[str], flags: Sequence[str]) -> Space:
    """Return the space that YAML files, left to right, and then flags describe.

    A flag `--search.KEY=` without a value removes a setting from the search.
    """
    parameters: dict[str, tuple[Parameter, str]] = {}
    overrides, known = list(read_overrides(files, flags)), dict(leaves(TrainSettings))
    check_renamed(overrides, known)
    for override in overrides:
        key = find_key(override, known)
        if override.value in (None, ""):
            parameters.pop(key, None)
        else:
            parameters[key] = read_parameter(key, override), override.origin
    if not parameters:
        raise UserError(
            "nothing to search: give a preset with `search:`, or "
            "--search.learning_rate='{loguniform: [1e-5, 1e-3]}'"
        )
    space = Space(tuple(parameter for parameter, _ in parameters.values()))
    return Space(tuple(validated(settings, space, *pair) for pair in parameters.values()))


def read_overrides(files: Sequence[str], flags: Sequence[str]) -> Iterator[Override]:
    """Yield the entries of the search space, in the order of files and flags."""
    for name in files:
        content = read_mapping(name).get(SEARCH) or {}
        if not isinstance(content, Mapping):
            raise UserError(f"{name}: {SEARCH}: expected `setting: {{kind: [...]}}` lines")
        for key, value in content.items():
            yield Override(str(key), value, f"{name}: {SEARCH}.{key}: {value}", name)
    for flag in flags:
        key, _, text = flag.removeprefix(f"--{SEARCH}.").partition("=")
        try:
            yield Override(key, load_yaml(text, flag, TextLoader), flag)
        except UserError:
            raise UserError(f"{flag}: write --search.{key}='{{uniform: [0, 1]}}'") from None


def read_parameter(key: str, override: Override) -> Parameter:
    """Return a parameter with its values as written; UserError if the form is wrong."""
    origin, value = override.origin, override.value
    kinds = (*RANGES, *LISTS)
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in kinds:
        raise UserError(f"{origin}: write {{KIND: [...]}}; kinds: {', '.join(kinds)}")
    ((kind, listed),) = value.items()
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{origin}: {kind} needs a list")
    section = key.partition(".")[0]
    if section not in SEARCHABLE or key in NOT_SEARCHABLE:
        raise UserError(
            f"{origin}: cannot be searched; settings of {', '.join(SEARCHABLE)} can, but for "
            f"{', '.join(NOT_SEARCHABLE)}"
        )
    field = dict(leaves(TrainSettings))[key]
    return Parameter(key, kind, tuple(listed), is_integer=field.annotation is int)


def validated(
    settings: TrainSettings, space: Space, parameter: Parameter, origin: str
) -> Parameter:
    """Return a parameter with its values in the types that training uses.

    UserError for a value that training accepts in no combination with the others.
    """
    values = []
    for value in parameter.values:
        try:
            fitted = with_values(settings, space.fitting(settings, parameter.key, value))
        except UserError as error:
            raise UserError(f"{origin}: {value}: {error}") from None
        values.append(getattr(getattr(fitted, parameter.section), parameter.leaf))
    if (kind := parameter.kind) in RANGES:
        least = 0 if kind == "loguniform" else -float("inf")
        if len(values) != 2 or not all(type(value) in (int, float) for value in values):
            raise UserError(f"{origin}: {kind} needs [lowest, highest]")
        if not least < values[0] < values[1]:
            raise UserError(f"{origin}: {kind} needs lowest < highest{', above 0' * (least == 0)}")
    return replace(parameter, values=tuple(values))


def with_values(settings: T, values: Values) -> T:
    """Return the settings with a trial's values; UserError if they are not valid together."""
    nested = settings.model_dump(exclude_unset=True)
    for key, value in values.items():
        section, _, leaf = key.partition(".")
        nested.setdefault(section, {})[leaf] = value
    try:
        return type(settings).model_validate(nested)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
