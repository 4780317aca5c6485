"""Registries: the values of settings are what is implemented, neither more nor less."""

import abc
import importlib
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from yuzogpt.cli import VERBS
from yuzogpt.cli.help import settings_help
from yuzogpt.config import ModelSettings, TrainSettings
from yuzogpt.config.registry import OneOf, Registry, read_entries, values_of
from yuzogpt.config.resolve import leaves, resolve
from yuzogpt.errors import UserError

FIELDS = {
    (dotted, one_of): field
    for verb in VERBS.values()
    for dotted, field in leaves(verb.schema)
    for one_of in field.metadata
    if isinstance(one_of, OneOf)
}
REFERENCES = sorted({one_of.registry for _, one_of in FIELDS})


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_a_source_says_is_what_its_module_registers(reference):
    module, _, name = reference.partition(":")
    registry = getattr(importlib.import_module(module), name)
    assert registry.entries == read_entries(module, name)
    assert list(registry) == list(registry.entries)
    assert len(set(map(id, registry.values()))) == len(registry)


def test_defaults_are_registered():
    for (_, one_of), field in FIELDS.items():
        one_of.check(field.default)


def test_a_value_without_an_implementation_fails_at_import():
    registry = Registry("kind")

    class Base(abc.ABC):
        @abc.abstractmethod
        def build(self): ...

    with pytest.raises(TypeError, match="kind planted: not implemented build"):

        @registry.register("planted", help="")
        class Planted(Base): ...

    with pytest.raises(TypeError, match="kind planted: not implemented"):
        registry.register("planted", help="")(None)
    assert dict(registry) == registry.entries == {}


def test_no_name_is_registered_twice_and_no_trait_misspelt():
    registry = Registry("kind", "is_gated")
    registry.register("one", help="", is_gated=True)(1)
    assert registry.has("one", "is_gated")
    with pytest.raises(ValueError, match="kind two: unknown traits is_gatd"):
        registry.register("two", help="", is_gatd=True)
    with pytest.raises(ValueError, match="kind one: registered twice"):
        registry.register("one", help="")(2)


def test_a_value_that_is_registered_later_is_a_value(monkeypatch):
    from yuzogpt.model.layers import ACTIVATIONS

    monkeypatch.setattr(ACTIVATIONS, "entries", dict(ACTIVATIONS.entries))
    monkeypatch.setattr(ACTIVATIONS, "_implementations", dict(ACTIVATIONS._implementations))
    ACTIVATIONS.register("mine", help="of this test")(abs)
    assert ModelSettings(activation="mine").activation == "mine"
    assert values_of(ModelSettings.model_fields["activation"])["mine"] == "of this test"


def test_an_unknown_value_names_the_nearest_or_all():
    with pytest.raises(
        UserError, match=r"--activation=swigl: no 'swigl'; did you mean swiglu\? \(default"
    ):
        resolve(TrainSettings, [], ["--activation=swigl"])
    with pytest.raises(UserError, match="--norm=4: no '4'; known: layer, rms"):
        resolve(TrainSettings, [], ["--norm=4"])


def test_help_says_what_each_value_is():
    lines = " ".join(settings_help(TrainSettings))
    assert "swiglu: three matrices of 2/3" in " ".join(lines.split())


@pytest.mark.slow
def test_no_help_and_no_check_imports_torch():
    code = (
        "import sys; from yuzogpt.cli import main\n"
        "main(['train', '--help'])\n"
        "main(['train', '--activation=relu2', '--dry_run'])\n"
        "assert not {'torch', 'yuzogpt.model.layers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)
