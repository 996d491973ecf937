"""Everything that tfpar raises on purpose. Each message says what is wrong, the values, and what to do."""

import logging
import re
import sys
import traceback


class TfparError(ValueError):
    """The base of tfpar's errors; a `ValueError`, so code that catches Keras' own errors catches these."""


class DeviceError(TfparError):
    """Devices that do not exist, repeat, or do not fill the mesh."""


class PartitionError(TfparError):
    """A model that cannot be cut into the stages asked for."""


class ScheduleError(TfparError):
    """A schedule that breaks a dependency; the message shows the whole schedule."""


class ModelError(TfparError):
    """A model that cannot be split as asked without changing its numbers."""


class ScopeError(TfparError):
    """A variable that was created outside of the strategy's scope."""


class LayoutError(TfparError):
    """Weights that cannot be divided between ranks as asked."""


class BatchError(TfparError):
    """A batch that cannot be divided: empty, or with parts of unequal length."""


class FileError(TfparError, OSError):
    """A file that cannot be read into a model; the model stays as it is."""


class StageError(TfparError):
    """A step that failed on a device; the message names the stage, the micro-batch and the layer."""


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
