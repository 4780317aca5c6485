"""Keyword arguments as settings: checked, and refused with the nearest match, as flags are."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from yuzogpt.config import Section
from yuzogpt.config.resolve import Override, leaves, resolve

S = TypeVar("S", bound=Section)
F = TypeVar("F", bound=Callable[..., Any])

File = str | os.PathLike[str]  # a preset's name, or the path of a YAML file


def read_settings(schema: type[S], files: Sequence[File], keywords: Mapping[str, Any]) -> S:
    """Return the settings from the defaults, `files` and `keywords`; UserError as `resolve`."""
    values = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in keywords.items()}
    overrides = [Override(key, value, f"{key}={value!r}") for key, value in values.items()]
    return resolve(schema, [os.fspath(file) for file in files], overrides)


def takes_settings(schema: type[Section]) -> Callable[[F], F]:
    """Show a schema's settings in a function's signature, for help() and completion."""
    settings = [
        inspect.Parameter(
            dotted.partition(".")[2],
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=field.annotation,
        )
        for dotted, field in leaves(schema)
    ]

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = [parameter.name for parameter in own]
        more = [parameter for parameter in settings if parameter.name not in names]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *more])
        return function

    return decorate
