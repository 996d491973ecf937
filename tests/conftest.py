"""Every test process is one TensorFlow runtime with eight logical CPU devices."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
stderr, silence = os.dup(2), os.open(os.devnull, os.O_WRONLY)
os.dup2(silence, 2)  # TensorFlow's greetings, which pytest would print last

import keras
import pytest
import tensorflow as tf
from training import STRATEGIES, gradients_forgotten, mostly

from tfpar.testing import logical_cpus

logical_cpus(8, threads=1)
tf.config.list_logical_devices()  # starts TensorFlow
os.dup2(stderr, 2)


@pytest.fixture(params=mostly(list(STRATEGIES), ["pipeline"]))
def strategy(request):
    """Each strategy, on two devices; layers on devices, which is a pipeline of one micro-batch, by `-m every`."""
    return STRATEGIES[request.param]()


@pytest.fixture(autouse=True)
def fresh_keras():
    """Names, seeds and the default dtype begin anew in each test."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    with gradients_forgotten():
        yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
