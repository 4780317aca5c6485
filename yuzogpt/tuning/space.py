"""The search space: which settings a sweep varies, and over which values.

In: `search:` of YAML files and `--search.KEY=...`, by the keys of the settings themselves:

    search:
      learning_rate: {loguniform: [1e-5, 1e-3]}
      dropout: {uniform: [0.0, 0.3]}
      weight_decay: {choice: [0.0, 0.01, 0.1]}
      beta2: {grid: [0.95, 0.99]}

Out: a `Space`, every value of which training takes; from it, Optuna's trials draw theirs.
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
# Equal for all trials: else the longest would win, or losses would not compare.
EQUAL = ("schedule.max_iters", "model.block_size", "model.vocab_size")
MOST_TRIED = 1000  # combinations, to find one that a value fits into

T = TypeVar("T", bound=TrainSettings)
Values = dict[str, Any]  # by `section.leaf`


@dataclass(frozen=True)
class Parameter:
    """One setting that varies."""

    key: str  # section.leaf
    kind: str  # uniform, loguniform: values are (low, high); choice, grid: all there are
    values: tuple[Any, ...]
    is_whole: bool = False  # whole numbers only

    @property
    def section(self) -> str:
        """The name of its section."""
        return self.key.partition(".")[0]

    @property
    def leaf(self) -> str:
        """The name without its section."""
        return self.key.partition(".")[2]

    def has(self, value: Any) -> bool:
        """Tell whether a value can be drawn."""
        if self.kind in LISTS:
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    def distribution(self, *included: Any) -> "optuna.distributions.BaseDistribution":
        """Return it as Optuna's, widened to the values that are `included`."""
        from optuna import distributions

        if self.kind in LISTS:
            return distributions.CategoricalDistribution(
                tuple(dict.fromkeys((*self.values, *included)))
            )
        low, high = min((*self.values, *included)), max((*self.values, *included))
        kind = distributions.IntDistribution if self.is_whole else distributions.FloatDistribution
        return kind(low, high, log=self.kind == "loguniform" and low > 0)


@dataclass(frozen=True)
class Space:
    """All of them."""

    parameters: tuple[Parameter, ...]

    def has(self, values: Values) -> bool:
        """Tell whether values can be drawn."""
        return all(one.has(values[one.key]) for one in self.parameters)

    def distributions(self) -> "dict[str, optuna.distributions.BaseDistribution]":
        """Return it as Optuna's."""
        return {one.key: one.distribution() for one in self.parameters}

    def defaults(self, settings: TrainSettings) -> Values:
        """Return what the settings themselves say."""
        nested = settings.model_dump()
        return {one.key: nested[one.section][one.leaf] for one in self.parameters}

    def fitting(self, settings: TrainSettings, key: str, value: Any) -> Values:
        """Return a combination with this value that training takes; UserError if there is none.

        Of ranges the ends are tried, and of very many combinations some, drawn at random.
        """
        others = [one for one in self.parameters if one.key != key]
        keys = [one.key for one in others]
        reason = None
        for drawn in some_of([one.values for one in others]):
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
        """Return every combination; UserError if there are not finitely many."""
        for one in self.parameters:
            if one.kind not in LISTS:
                raise UserError(
                    f"search.{one.leaf}: {one.kind} has no end; --search_algorithm=grid wants "
                    "choice or grid"
                )
        keys = [one.key for one in self.parameters]
        combinations = itertools.product(*(one.values for one in self.parameters))
        return [dict(zip(keys, values, strict=True)) for values in combinations]

    def to_yaml(self) -> str:
        """Return it as a section of YAML that `read_space` reads back."""
        return yaml.safe_dump({SEARCH: self.describe()}, sort_keys=False)

    def describe(self) -> dict[str, dict[str, list[Any]]]:
        """Return what `read_space` reads."""
        return {one.key: {one.kind: list(one.values)} for one in self.parameters}


def some_of(lists: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Yield every way to take one value of each list, or MOST_TRIED of them at random."""
    if math.prod(map(len, lists)) <= MOST_TRIED:
        yield from itertools.product(*lists)
        return
    generator = random.Random(0)
    for _ in range(MOST_TRIED):
        yield tuple(generator.choice(values) for values in lists)


def read_space(settings: TrainSettings, files: Sequence[str], flags: Sequence[str]) -> Space:
    """Return the space around `settings` that YAML files, left to right, and flags add up to.

    A flag `--search.KEY=` with nothing behind it takes a setting out of the search.
    """
    found: dict[str, tuple[Parameter, str]] = {}
    overrides, known = list(written(files, flags)), dict(leaves(TrainSettings))
    check_renamed(overrides, known)
    for override in overrides:
        key = find_key(override, known)
        if override.value in (None, ""):
            found.pop(key, None)
        else:
            found[key] = read_parameter(key, override), override.origin
    if not found:
        raise UserError(
            "nothing to search: give a preset with `search:`, or "
            "--search.learning_rate='{loguniform: [1e-5, 1e-3]}'"
        )
    space = Space(tuple(parameter for parameter, _ in found.values()))
    return Space(tuple(taken(settings, space, *one) for one in found.values()))


def written(files: Sequence[str], flags: Sequence[str]) -> Iterator[Override]:
    """Yield what the user wrote, in its order."""
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
    """Return a parameter with its values as they are written; UserError for another form."""
    origin, value = override.origin, override.value
    kinds = (*RANGES, *LISTS)
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in kinds:
        raise UserError(f"{origin}: write {{KIND: [...]}}; kinds: {', '.join(kinds)}")
    ((kind, listed),) = value.items()
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{origin}: {kind} wants a list")
    section = key.partition(".")[0]
    if section not in SEARCHABLE or key in EQUAL:
        raise UserError(f"{origin}: not to be searched; {', '.join(SEARCHABLE)} settings are")
    field = dict(leaves(TrainSettings))[key]
    return Parameter(key, kind, tuple(listed), is_whole=field.annotation is int)


def taken(settings: TrainSettings, space: Space, parameter: Parameter, origin: str) -> Parameter:
    """Return a parameter with its values as training reads them.

    UserError for a value that training takes in no combination with the others.
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
        if len(values) != 2 or not all(type(one) in (int, float) for one in values):
            raise UserError(f"{origin}: {kind} wants [lowest, highest]")
        if not least < values[0] < values[1]:
            raise UserError(f"{origin}: {kind} wants lowest < highest{', above 0' * (least == 0)}")
    return replace(parameter, values=tuple(values))


def with_values(settings: T, values: Values) -> T:
    """Return the settings with a trial's values; UserError, without them, if they do not fit."""
    nested = settings.model_dump(exclude_unset=True)
    for key, value in values.items():
        section, _, leaf = key.partition(".")
        nested.setdefault(section, {})[leaf] = value
    try:
        return type(settings).model_validate(nested)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
