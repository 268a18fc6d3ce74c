"""The clock of a run counts what ran by it, and nothing else."""

import contextlib

import pytest

from clagrange.study import clock


@pytest.fixture
def now(monkeypatch):
    """What the time is, in a list; tests move it."""
    time = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: time[0])
    return time


def test_blocks_in_which_it_is_stopped_do_not_count(now):
    watch = clock.Clock()
    now[0] += 1.0
    with watch.running():
        now[0] += 2.0
        with watch.stopped():
            now[0] += 4.0
            with watch.stopped():
                now[0] += 8.0
            now[0] += 16.0
            with watch.running():
                now[0] += 32.0
        now[0] += 64.0
    now[0] += 128.0
    with watch.stopped():
        now[0] += 256.0
    assert watch.seconds == 2.0 + 32.0 + 64.0


def test_a_block_that_raises_leaves_the_clock_as_it_was(now):
    watch = clock.Clock()
    with watch.running():
        with contextlib.suppress(KeyError), watch.stopped():
            now[0] += 1.0
            raise KeyError
        now[0] += 2.0
    now[0] += 4.0
    assert watch.seconds == 2.0


def test_work_that_a_device_has_still_to_do_counts_where_it_was_ordered(now, monkeypatch):
    queue = []

    def synchronize(device):
        assert device.type == "cuda"
        now[0] += sum(queue)
        queue.clear()

    monkeypatch.setattr(clock.torch.accelerator, "synchronize", synchronize)
    watch = clock.Clock("cuda")
    with watch.running():
        queue.append(1.0)
        with watch.stopped():
            queue.append(2.0)
        queue.append(4.0)
    queue.append(8.0)
    assert watch.seconds == 1.0 + 4.0
