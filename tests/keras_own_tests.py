"""Run Keras' own tests of distribution and training, as installed, under `DataParallelStrategy`.

    python tests/keras_own_tests.py [arguments for pytest]

The tests of distribution get it in MirroredStrategy's place; those of the trainer run inside of its scope. What is
expected to fail is listed below, each with its reason; anything else that fails, or one of these that passes, makes the
script fail. Needs jax, which Keras' file of trainer tests imports; tests of torch and grain are left out without them.
"""

import functools
import importlib.util
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import tensorflow as tf

DISTRIBUTION = ("backend/tensorflow/distribute_test.py", "backend/tensorflow/optimizer_distribute_test.py")
TRAINER = "trainers/trainer_test.py"
EXPECTED = {
    "test_variable_creation": "asks for MirroredVariable in the name of the class; ours is LogicalVariable, a subclass",
    "test_gradient_accumulation": "asks accumulators for what one replica saw; ours hold the sum over replicas, so "
    "that clipping and accumulation are those of one device. (It hands one tensor to both replicas, which "
    "tf.distribute takes for a value that is not distributed, as test_ema expects.)",
}
NEEDED = {"torch": "torch_dataloader", "grain": "grain_data"}  # packages, and the tests that need them


class Plugin:
    """Puts the strategy in place, and compares what failed with what was expected to."""

    def __init__(self):
        self.wrong, self.passed = [], 0

    @pytest.fixture(autouse=True)
    def in_place_of_mirrored(self, monkeypatch):
        import tfpar

        monkeypatch.setattr(tf.distribute, "MirroredStrategy", tfpar.DataParallelStrategy)

    def pytest_collection_modifyitems(self, items):
        missing = [tests for package, tests in NEEDED.items() if importlib.util.find_spec(package) is None]
        items[:] = [item for item in items if not any(tests in item.name for tests in missing)]
        for cls, name in {(item.cls, item.name) for item in items if item.path.name == pathlib.Path(TRAINER).name}:
            setattr(cls, name, in_scope(getattr(cls, name)))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        if report.when != "call" or report.skipped:
            return
        expected = item.name in EXPECTED
        self.passed += report.passed
        if report.failed != expected:
            self.wrong.append(f"{item.name} {'failed' if report.failed else 'passed, and was expected to fail'}")

    def pytest_terminal_summary(self, terminalreporter):
        for name, reason in EXPECTED.items():
            terminalreporter.write_line(f"expected to fail: {name}: {reason}")
        for line in self.wrong:
            terminalreporter.write_line(f"UNEXPECTED: {line}")


def in_scope(test):
    """A test that runs in a scope, which opens after the test's own preparations have reset TensorFlow."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        import tfpar

        with tfpar.DataParallelStrategy(["CPU:0", "CPU:1"]).scope():
            return test(*args, **kwargs)

    return run


def main(arguments):
    keras = pathlib.Path(importlib.util.find_spec("keras").origin).parent / "src"
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    plugin = Plugin()
    files = [str(keras / name) for name in (*DISTRIBUTION, TRAINER)]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--rootdir", str(keras)]
    pytest.main([*options, *files, *arguments], plugins=[plugin])
    return 1 if plugin.wrong or not plugin.passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
