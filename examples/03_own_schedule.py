"""Can I write a schedule of my own? A function of two sizes that returns what each device does, in order."""

import keras
import numpy as np
from keras import layers

import tfpar
from tfpar import Action, Kind, Schedule
from tfpar.testing import logical_cpus


def interleaved(devices, micro_batches):
    """Two stages on each device: a batch passes every device twice."""
    work = [(0, Kind.FORWARD), (1, Kind.FORWARD), (1, Kind.BACKWARD), (0, Kind.BACKWARD)]
    return Schedule(
        tuple(
            tuple(Action(turn * devices + d, kind, m) for turn, kind in work for m in range(micro_batches))
            for d in range(devices)
        )
    )


def main():
    for function in (tfpar.gpipe, tfpar.one_f_one_b, interleaved):
        schedule = function(2, 4)
        timeline = tfpar.simulate(schedule, tfpar.StageCost.even(schedule.stages, forward=2 / schedule.stages))
        print(f"{function.__name__}: {timeline.bubble:.0%} idle", schedule, timeline.draw(), sep="\n")
    try:
        Schedule(tuple(line[::-1] for line in tfpar.gpipe(2, 2).devices))
    except tfpar.ScheduleError as error:
        print("\nbackwards:", error)

    logical_cpus(2)
    strategy = tfpar.PipelineStrategy(micro_batches=4, schedule=interleaved)
    with strategy.scope():
        model = keras.Sequential([layers.Input((16,)), *(layers.Dense(32, "relu") for _ in range(7)), layers.Dense(1)])
        model.compile("adam", "mse")
    model.fit(np.random.rand(64, 16), np.random.rand(64), batch_size=32, verbose=2)
    print(strategy.explain(model))


if __name__ == "__main__":
    main()
