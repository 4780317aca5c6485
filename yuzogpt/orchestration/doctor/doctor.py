"""`yuzogpt doctor` on a cluster; doctor/findings.py draws the conclusions from the survey."""

import os

from yuzogpt.config import SoundnessSettings
from yuzogpt.doctor.survey import Survey
from yuzogpt.orchestration.cluster import connected
from yuzogpt.orchestration.environment import cluster_address
from yuzogpt.runtime.cores import available_cores
from yuzogpt.runtime.signals import stopped_by_sigterm
from yuzogpt.storage.paths import SUBMITTED_JOB


def survey_cluster(settings: SoundnessSettings) -> Survey:
    """Examine the cluster that the settings name, or an embedded one: this machine."""
    address = cluster_address(settings.ray_address)
    with (
        stopped_by_sigterm("stopped (SIGTERM)"),
        connected(settings.ray_address, available_cores()),
    ):
        # Not before: ray reads when it is imported whether it needs a token.
        from yuzogpt.orchestration.doctor.node_probe import ClusterProbe

        survey = Survey(is_shared=bool(address) or SUBMITTED_JOB in os.environ)
        ClusterProbe(survey, settings.storage).run()
        return survey
