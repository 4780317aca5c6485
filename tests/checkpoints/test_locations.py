"""Paths among the settings: all of them are made absolute, each in its way."""

import pytest

from yuzogpt.checkpoints.locations import with_absolute_paths
from yuzogpt.cli import VERBS
from yuzogpt.config import (
    DoctorSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    PrepareSettings,
    ReportSettings,
    SampleSettings,
    ServeSettings,
    TrainSettings,
)
from yuzogpt.config.resolve import leaves, resolve
from yuzogpt.errors import UserError
from yuzogpt.storage.paths import SUBMITTED_JOB


@pytest.mark.parametrize(
    ("schema", "flags", "dotted", "path"),
    [
        (TrainSettings, "", "data.data_dir", "{cwd}/data/shakespeare_char"),
        (TrainSettings, "--dataset=x --storage=/s", "data.data_dir", "/s/data/x"),
        (TrainSettings, "--data_dir=gs://b/x", "data.data_dir", "gs://b/x"),
        (TrainSettings, "--storage=s3://b", "run.out_dir", "s3://b/out"),
        (TrainSettings, "--out_dir=/r/", "run.out_dir", "/r"),
        (TrainSettings, "--init_from=gpt2-xl", "run.init_from", "gpt2-xl"),
        (TrainSettings, "--init_from=run", "run.init_from", "{cwd}/run"),
        (TrainSettings, "--benchmark_dir=b --storage=/s", "evaluation.benchmark_dir", "/s/b"),
        (TrainSettings, "", "evaluation.benchmark_dir", ""),
        (TrainSettings, "--wandb_key_file=k --storage=/s", "log.wandb_key_file", "{cwd}/k"),
        (PrepareSettings, "--source=t.txt", "corpus.source", "{cwd}/t.txt"),
        (PrepareSettings, "--source=hf://datasets/x", "corpus.source", "hf://datasets/x"),
        (PrepareSettings, "", "corpus.source", ""),
        (PrepareSettings, "--dataset=x", "corpus.data_dir", "{cwd}/data/x"),
        (InspectSettings, "--data_dir=d", "inspect.data_dir", "{cwd}/d"),
        (ReportSettings, "--out_dir=r --html=p.html --storage=/s", "report.html", "/s/p.html"),
        (ExportSettings, "", "export.hf_dir", "{cwd}/hf"),
        (SampleSettings, "--prompts=p", "sampling.prompts", "{cwd}/p"),
        (EvaluateSettings, "", "benchmarks.data_dir", "{cwd}/data/openwebtext"),
        (ServeSettings, "--api_keys_file=k --storage=/s", "limits.api_keys_file", "{cwd}/k"),
        (DoctorSettings, "--storage=s", "doctor.storage", "{cwd}/s"),
    ],
)
def test_each_path_is_made_absolute_in_its_way(schema, flags, dotted, path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = with_absolute_paths(resolve(schema, [], flags.split()))
    section, leaf = dotted.split(".")
    assert getattr(getattr(settings, section), leaf) == path.format(cwd=tmp_path)


@pytest.mark.parametrize(
    ("schema", "flags", "message"),
    [
        (TrainSettings, "--out_dir=", "--out_dir=: empty"),
        (TrainSettings, "--out_dir=hf://b/x", "hf:// is not supported"),
        (TrainSettings, "--benchmark_dir=s3://b/x", "s3:// is not supported"),
        (PrepareSettings, "--data_dir=s3://b/x", "s3:// is not supported"),
        (InspectSettings, "", "--data_dir=: empty"),
        (ReportSettings, "", "--out_dir=: empty"),
        (ServeSettings, "--api_keys_file=~nobodyatall/k", "no such user"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(schema, flags, message):
    with pytest.raises(UserError, match=message):
        with_absolute_paths(resolve(schema, [], flags.split()))


def test_a_submitted_job_refuses_relative_paths_that_it_reads(monkeypatch):
    monkeypatch.setenv(SUBMITTED_JOB, "{}")
    settings = resolve(TrainSettings, [], ["--out_dir=/r", "--init_from=gpt2"])
    with pytest.raises(UserError, match=r"--data_dir=data/shakespeare_char: relative.*--storage="):
        with_absolute_paths(settings)
    assert with_absolute_paths(settings, ["data.data_dir"]).data.data_dir == ""


def test_no_path_is_forgotten():
    for verb in VERBS.values():
        for dotted, field in leaves(verb.schema):
            if dotted.endswith(("_dir", "_file")):
                assert field.json_schema_extra["path"], dotted
