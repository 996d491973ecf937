"""Schedules: the picture, then the properties, then what is refused."""

import pytest

from tfpar.errors import ScheduleError
from tfpar.planning.cost import StageCost
from tfpar.planning.schedule import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    eager_one_f_one_b,
    forward_only,
    gpipe,
    needs,
    one_f_one_b,
)
from tfpar.planning.timeline import simulate

pytestmark = pytest.mark.fast

SIZES = [(s, m) for s in (1, 2, 3, 4, 7) for m in (1, 2, 3, 8)]
F, B = Kind.FORWARD, Kind.BACKWARD


def test_pictures():
    assert str(one_f_one_b(2, 3)) == "0F0 0F1 0B0 0F2 0B1 0B2\n1F0 1B0 1F1 1B1 1F2 1B2"
    assert str(gpipe(2, 2)) == "0F0 0F1 0B1 0B0\n1F0 1F1 1B1 1B0"
    assert str(forward_only(gpipe(2, 2))) == "0F0 0F1\n1F0 1F1"


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages, micro_batches", SIZES)
def test_properties(name, stages, micro_batches):
    schedule = SCHEDULES[name](stages, micro_batches)
    assert (schedule.stages, schedule.micro_batches) == (stages, micro_batches)
    assert sorted(map(str, schedule.order)) == sorted({
        f"{s}{k}{m}" for s in range(stages) for k in "FB" for m in range(micro_batches)
    })  # fmt: skip
    done = set()
    for action in schedule.order:
        assert set(needs(action, stages)) <= done
        done.add(action)
    for line in schedule.devices:
        places = [schedule.order.index(a) for a in line]
        assert places == sorted(places)


@pytest.mark.parametrize("stages, micro_batches", SIZES)
def test_what_memory_must_hold(stages, micro_batches):
    for s in range(stages):
        assert one_f_one_b(stages, micro_batches).in_flight(s) == min(stages - s, micro_batches)
        assert eager_one_f_one_b(stages, micro_batches).in_flight(s) == min(2 * (stages - s) - 1, micro_batches)
        assert gpipe(stages, micro_batches).in_flight(s) == micro_batches
        assert forward_only(gpipe(stages, micro_batches)).in_flight(s) == 1


def test_transfers_that_1f1b_waits_for():
    """For each micro-batch, in 1F1B; when the pipeline fills and empties only, in the others."""
    cost = StageCost((1.0,) * 4, (2.0,) * 4, transfer=0.25)
    waiting, eager, gpiped = (simulate(s(4, 20), cost).makespan for s in (one_f_one_b, eager_one_f_one_b, gpipe))
    assert eager == gpiped == (20 + 3) * 3 + 6 * 0.25
    assert waiting > eager + 15 * 0.25


def lines(*texts):
    """A schedule from its picture."""
    return Schedule(tuple(tuple(Action(int(a[0]), Kind(a[1]), int(a[2:])) for a in t.split()) for t in texts))


def test_a_device_may_hold_several_stages():
    schedule = lines("0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0")
    assert schedule.device_of == (0, 1, 0, 1)


@pytest.mark.parametrize(
    "texts, message",
    [
        (["0F0 0B0 0F0"], "0F0 stands more than once"),
        (["0F0 0F1 0B0"], "lacks 0B1"),
        (["0F0 1B0", "1F0 0B0"], "stage 0 is on devices \\[0, 1\\]"),
        (["0B0 0F0"], "0B0 waits for 0F0"),
        (["0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1"], "0B0 waits for 1B0, 1F1 waits for 0F1\n0F0 0B0"),
        ([""], "at least one action"),
    ],
)
def test_refused(texts, message):
    with pytest.raises(ScheduleError, match=message):
        lines(*texts)
