"""Where the time of a conversion went."""

import pytest

from rvc_mlx import report


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test moves."""
    now = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_time_within_an_inner_stage_counts_for_that_alone(clock):
    made = report.Report()
    with made.stage("finish"):
        clock(1)
        with made.stage("vocoder"):
            clock(2)
            with made.stage("source"):
                clock(4)
        clock(8)
        with made.stage("vocoder"):
            clock(16)
    with made.stage("write"):
        clock(32)
    assert made.stages == {"finish": 9, "vocoder": 18, "source": 4, "write": 32}


def test_a_failed_stage_counts_too(clock):
    made = report.Report()

    def fail():
        with made.stage("finish"):
            with made.stage("vocoder"):
                clock(2)
            clock(1)
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert made.stages == {"finish": 1, "vocoder": 2}
