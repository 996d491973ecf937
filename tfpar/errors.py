"""Everything that tfpar raises on purpose. Each message says what is wrong, the values, and what to do."""

import logging
import re
import sys
import traceback


class TfparError(ValueError):
    """The base class of tfpar's errors; a `ValueError`, so code that catches those of Keras catches these."""


class DeviceError(TfparError):
    """Devices that do not exist, repeat, or are not as many as the mesh has coordinates.

    Raised by `Mesh`, by the constructors of strategies, and by `tfpar.testing.logical_cpus` after TensorFlow's start.
    """


class PartitionError(TfparError):
    """A model that cannot be cut into the stages asked for: too few layers, or a `placement` that does not fit it.

    Raised when the model is first used or explained.
    """


class ScheduleError(TfparError):
    """A schedule that no strategy knows, that is not complete, that deadlocks, or that is not of the sizes asked for.

    Also `micro_batches` below 1. Where there is a schedule, the message shows it.
    """


class ModelError(TfparError):
    """A model that cannot be divided as asked without changing its numbers, or an unknown value of an option."""


class ScopeError(TfparError):
    """A model or a variable that was created in another scope than the strategy's, or a scope within another's."""


class LayoutError(TfparError):
    """A `layout` that is no mapping, does not fit the weights, or divides them as no rule can.

    Raised when the model is first used or explained.
    """


class BatchError(TfparError):
    """A batch that cannot be divided: empty, or with arrays of unequal length or without a batch dimension."""


class FileError(TfparError, OSError):
    """A file that `model.load_weights` cannot read, or that is of another model; the model stays as it is.

    Also an `OSError`.
    """


class StageError(TfparError):
    """A step of `fit`, `evaluate` or `predict` that failed on a device, or a loss that `CheckNumerics` refused.

    The message names the stage, the micro-batch and the layer, as far as they can be found; TensorFlow's error is the
    `__cause__`. With `run_eagerly=True`, and in a loop of your own, TensorFlow's error comes as it is.
    """


class Caught:
    """What becomes of exceptions of a user's code that is tried out; of those of tfpar's own code, never this.

    They are logged at debug level. With `strict`, for tests, they are raised too.
    """

    log, strict = logging.getLogger("tfpar"), False

    @classmethod
    def theirs(cls, error: Exception, what: str):
        """Called where an exception was caught, with what failed; raises it again if it is a mistake of tfpar's."""
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        ours = frame.f_globals.get("__name__", "").split(".")[0] == "tfpar"
        if cls.strict or (ours and not isinstance(error, TfparError) and not hasattr(error, "is_expected")):
            raise error
        cls.log.debug("%s failed", what, exc_info=error)


def user_level() -> int:
    """The `stacklevel` of a warning given where this is called: that of the first caller outside of libraries."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


LIBRARIES = ("tfpar", "keras", "tensorflow", "contextlib", "functools")


def brief(error: Exception) -> str:
    """What an exception says, without what Keras adds about arguments."""
    added = re.search(r"\x1b\[1m(.*?)\x1b\[0m", str(error), re.DOTALL)
    return added[1] if added else str(error).split("\n\n")[0]
