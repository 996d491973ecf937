"""The simulator against formulas, and the timeline's arithmetic and picture."""

import pytest
from rich.console import Console

from tfpar.planning.cost import StageCost
from tfpar.planning.schedule import Action, Kind, gpipe, needs, one_f_one_b
from tfpar.planning.timeline import Span, Timeline, simulate

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
@pytest.mark.parametrize("stages, micro_batches", [(1, 4), (2, 2), (4, 8), (3, 7)])
def test_bubble_of_even_stages(make, stages, micro_batches):
    """(S - 1) / (M + S - 1), Huang et al."""
    timeline = simulate(make(stages, micro_batches), StageCost.even(stages))
    assert timeline.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))
    assert timeline.makespan == pytest.approx(3 * (micro_batches + stages - 1))


def test_uneven_stages_wait_for_the_slowest():
    timeline = simulate(one_f_one_b(2, 100), StageCost((1.0, 3.0), (2.0, 6.0)))
    assert timeline.makespan == pytest.approx(1 + 100 * 9 + 2)
    assert timeline.busy(0) / timeline.makespan == pytest.approx(1 / 3, rel=0.01)


def test_transfers_delay_but_do_not_occupy():
    cost = StageCost((1.0, 1.0), (1.0, 1.0), transfer=0.5)
    timeline = simulate(gpipe(2, 1), cost)
    assert timeline.makespan == pytest.approx(1 + 0.5 + 1 + 1 + 0.5 + 1)
    assert timeline.busy(0) == pytest.approx(2)


def test_nothing_starts_before_what_it_needs():
    timeline = simulate(one_f_one_b(3, 5), StageCost((1.0, 2.0, 0.5), (3.0, 1.0, 2.0), 0.1))
    times = {s.action: s for s in timeline.spans}
    for span in timeline.spans:
        assert all(times[n].stop <= span.start for n in needs(span.action, 3))


def span(device, kind, m, start, stop):
    return Span(device, Action(device, kind, m), start, stop)


def test_timeline():
    timeline = Timeline((
        span(0, Kind.FORWARD, 0, 0.0, 1.0), span(0, Kind.FORWARD, 1, 0.5, 2.0), span(1, Kind.BACKWARD, 11, 2.0, 4.0),
    ))  # fmt: skip
    assert (timeline.devices, timeline.makespan, timeline.busy(0)) == (2, 4.0, 2.0)
    assert timeline.bubble == pytest.approx(0.5)
    assert timeline.draw(8) == " 0 0111····\n 1 ····¹¹¹¹"
    console = Console(width=100, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(timeline)
    assert "\x1b[36m0" in capture.get()
