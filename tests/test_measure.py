"""The measured timeline: the actions of the schedule, in its order, one at a time on each device."""

import keras
import numpy as np
import pytest
from training import build, compiled, data

import tfpar
from tfpar.measure import measured
from tfpar.testing import assert_same

X, Y = data()


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_measured(schedule):
    strategy = tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=4, schedule=schedule)
    model = compiled(strategy)
    timeline = measured(model, X, Y, repeat=2)
    lines = strategy.schedule(4).devices
    assert timeline.devices == 2 and 0 <= timeline.bubble < 1 and timeline.makespan > 0
    for device, line in enumerate(lines):
        spans = [s for s in timeline.spans if s.device == device]
        assert sorted(spans, key=lambda s: s.start) == sorted(spans, key=lambda s: line.index(s.action))
        assert all(s.stop >= s.start for s in spans)
        assert all(after.start >= before.stop for before, after in zip(spans[:-1], spans[1:], strict=True))
    assert str(timeline.draw()).count("\n") == 1


@pytest.mark.parametrize("mesh", [tfpar.Mesh(data=2, stage=2), tfpar.Mesh(data=2, tensor=2), tfpar.Mesh(2, 2, 2)])
def test_meshes_of_several_axes(mesh):
    """Each device has the actions of its own stage, on its own part of the batch, one after the other."""
    strategy = tfpar.MeshStrategy(mesh, micro_batches=2)
    timeline = measured(compiled(strategy), X, Y)
    assert timeline.devices == mesh.size and 0 <= timeline.bubble < 1
    for d in range(mesh.size):
        replica, _, stage, _ = np.unravel_index(d, mesh.shape)
        spans = [s for s in timeline.spans if s.device == d]
        assert {s.action.micro_batch for s in spans} == {2 * replica, 2 * replica + 1}
        if mesh.tensor == 1:
            assert {s.action.stage for s in spans} == {stage}
        assert all(after.start >= before.stop for before, after in zip(spans[:-1], spans[1:], strict=True))


@pytest.mark.fast
def test_it_trains():
    """A measured step is a step."""
    one, other = compiled(), compiled(tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=4))
    measured(other, X, Y, repeat=2)
    for _ in range(3):
        one.train_on_batch(X, Y)
    assert_same(one, other, 1e-5, 1e-7)


@pytest.mark.fast
def test_what_cannot_be_measured():
    with pytest.raises(tfpar.ModelError, match="is not scheduled: construct and compile it in the scope"):
        measured(compiled(), X, Y)
    with tfpar.PipelineStrategy(["CPU:0"]).scope():
        model = build()
    with pytest.raises(tfpar.ModelError, match="is not scheduled"):
        measured(model, X, Y)
    whole = compiled(tfpar.PipelineStrategy(["CPU:0"]), loss=lambda y, p: keras.ops.mean(p), metrics=lambda: None)
    with pytest.raises(tfpar.ModelError, match="its train_step, compute_loss or loss needs the whole batch at once"):
        measured(whole, X, Y)


@pytest.mark.fast
def test_replicas():
    """Each on a line of its own."""
    strategy = tfpar.DataParallelStrategy(["CPU:0", "CPU:1", "CPU:2"])
    timeline = measured(compiled(strategy), *data(9))
    assert sorted(span.device for span in timeline.spans) == [0, 0, 1, 1, 2, 2]
    assert all(span.device == span.action.micro_batch for span in timeline.spans)
