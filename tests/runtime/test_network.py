"""The network between the ranks of a run: measured beside training, written down, reported."""

import pytest

from tests.conftest import tiny_settings, yuzogpt
from tests.training.worlds import losses, records, run_world


@pytest.mark.slow
def test_a_run_measures_its_network_and_computes_the_same(corpus_dir, tmp_path):
    flags = ("--max_iters=10",)
    run_world(2, tiny_settings(corpus_dir, tmp_path / "run", *flags, "--network_interval=4"))
    run_world(2, tiny_settings(corpus_dir, tmp_path / "plain", *flags, "--network_interval=0"))
    measured = records(tmp_path / "run", "network")
    assert [record["step"] for record in measured] == [0, 4, 8]
    for record in measured:
        assert 0 < record["latency_ms"] < 1000
        assert record["mbit_per_second"] > 0
        assert record["slowest_mbit_per_second"] > 0
        assert record["slowest_hop"] in ("rank 0 to 1", "rank 1 to 0")
    assert records(tmp_path / "plain", "network") == []
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    report = yuzogpt("report", str(tmp_path / "run"))
    assert "Mbit/s on the slowest hop" in report.stdout
