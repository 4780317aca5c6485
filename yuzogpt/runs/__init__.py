"""A run is one out_dir: its files, its one writer, and the checks before it starts or resumes."""

from yuzogpt.runs.directory import (
    CURVE,
    DELETING,
    ERRORS,
    EVALUATIONS,
    FAILED,
    METRICS,
    PAUSE,
    REPORT,
    SETTINGS,
    SIGNATURE,
    STOP,
    WANDB_ID,
    begin,
    clear,
    download_run,
    gives_way,
    header,
    hold_run_dir,
    open_for_reading,
    open_run,
    write_settings,
)
from yuzogpt.runs.preflight import (
    ResolvedRun,
    check,
    check_vocabulary,
    find_resume,
    ray_address,
    with_recorded_start,
    with_shape,
)
