"""`--dry_run`: the settings of a command as YAML, which it reads back."""

from collections.abc import Sequence

from yuzogpt.cli.plan import describe
from yuzogpt.config import PrepareSettings, Section, TrainSettings, TuneSettings
from yuzogpt.config.resolve import to_yaml
from yuzogpt.console.terminal import in_one_line
from yuzogpt.data.preparation.own_text import named_after_source
from yuzogpt.runs.own_corpus import with_own_out_dir


def preview(
    settings: Section, files: Sequence[str] = (), searched: Sequence[str] | None = None
) -> str:
    """Return the settings as YAML, without the shape that init_from's model decides.

    Estimates about a run stand above it, as comments.

    `searched`: the flags of a search space, which follows; None: there is none.
    """
    without = {}
    if isinstance(settings, PrepareSettings):
        settings = named_after_source(settings)
    if isinstance(settings, TrainSettings):
        settings = with_own_out_dir(settings)
        if settings.run.init_from != "scratch":
            kept = {"dropout", *settings.model.model_fields_set}
            without = {"model": set(type(settings.model).model_fields) - kept}
    head = ""
    if type(settings) is TrainSettings and not without:
        head = "".join(f"# {in_one_line(line)}\n" for line in describe(settings))
    text = head + to_yaml(settings, without)
    if searched is None:
        return text
    from yuzogpt.tuning.space import read_space

    assert isinstance(settings, TuneSettings)
    return text + read_space(settings, files, searched).to_yaml()
