"""Every setting, declared once: its name, default, unit and meaning. One file per verb.

Each verb has one pydantic model (`TrainSettings`, `PrepareSettings`, ...), composed of sections.
Leaf names are nanoGPT's where nanoGPT has one, and unique within a verb, so that `--n_layer=4`
needs no section. Next on the line: resolve.py reads values from YAML files and flags.
"""

from yuzogpt.config.batch import BatchSettings
from yuzogpt.config.bench import BenchmarkedSettings, BenchSettings
from yuzogpt.config.doctor import DoctorSettings, SoundnessSettings
from yuzogpt.config.evaluate import (
    BenchmarkSettings,
    EvaluatedModelSettings,
    EvaluateSettings,
    EvaluationDeviceSettings,
    EvaluationWorkSettings,
)
from yuzogpt.config.model import InitializationSettings, ModelSettings
from yuzogpt.config.prepare import (
    CorpusSettings,
    DistributedPrepareSettings,
    InspectedCorpus,
    InspectSettings,
    PrepareSettings,
)
from yuzogpt.config.read import (
    CompletedShell,
    CompletionSettings,
    ExportSettings,
    ExportTarget,
    ListedDirectory,
    ListSettings,
    ReportedRun,
    ReportSettings,
)
from yuzogpt.config.sample import (
    GenerateSettings,
    GenerationSettings,
    LoadedModelSettings,
    LoadSettings,
    SampleSettings,
    SamplingDeviceSettings,
    SamplingSettings,
)
from yuzogpt.config.schedule import ScheduleSettings
from yuzogpt.config.section import DeviceSettings, Part, Section, with_changes
from yuzogpt.config.serve import (
    HTTPSettings,
    LimitSettings,
    ReplicaSettings,
    ServedModelSettings,
    ServeSettings,
)
from yuzogpt.config.train import (
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    FinetuningSettings,
    GuardSettings,
    LogSettings,
    OptimizerSettings,
    ParallelSettings,
    RunSettings,
    TrainingDeviceSettings,
    TrainSettings,
    WorkerSettings,
)
from yuzogpt.config.tune import SweepSettings, TuneSettings
