"""`yuzogpt doctor`, as far as Ray: which cluster is examined.

In: settings. Out: a survey, from which doctor/findings.py concludes.
"""

import os

from yuzogpt.config import SoundnessSettings
from yuzogpt.doctor.survey import Survey
from yuzogpt.orchestration.cluster import connected
from yuzogpt.orchestration.environment import cluster_address
from yuzogpt.runtime.cores import available_cores
from yuzogpt.runtime.signals import stopped_by_sigterm
from yuzogpt.storage.paths import SUBMITTED_JOB


def survey_cluster(wanted: SoundnessSettings) -> Survey:
    """Examine the cluster that `wanted` names, or an embedded one: this machine."""
    address = cluster_address(wanted.ray_address)
    with (
        stopped_by_sigterm("stopped (SIGTERM)"),
        connected(wanted.ray_address, available_cores()),
    ):
        # Not before: ray learns when it is imported whether it asks for a token.
        from yuzogpt.orchestration.doctor.node_probe import ClusterProbe

        survey = Survey(is_shared=bool(address) or SUBMITTED_JOB in os.environ)
        ClusterProbe(survey, wanted.storage).run()
        return survey
