"""One exception class per kind of fault; each message gives the value, the rule and the way out.

``exit_code`` is what the command line returns for a fault of that kind.
"""


class KdscaleError(Exception):
    """Base of every fault kdscale raises on purpose."""

    exit_code = 1


class ConfigError(KdscaleError):
    """The configuration is wrong; nothing was started."""

    exit_code = 2


class DataError(KdscaleError):
    """Training or held-out text is missing, broken or empty."""


class ModelError(KdscaleError):
    """A model directory is missing, incomplete or of a kind that is not supported."""


class IdentityError(KdscaleError):
    """Two parts mean different things by the same numbers: another tokenizer, teacher or corpus."""


class PlacementError(KdscaleError):
    """The cluster cannot hold what the config asks for, or a port is taken."""


class TeacherError(KdscaleError):
    """A teacher rank died, or did not answer in time."""


class StudentError(KdscaleError):
    """A student rank died, or did not answer in time."""


class DivergedError(KdscaleError):
    """The loss or its gradient is no finite number any more: going on would leave a broken student, or the same one."""


class OnPolicyError(KdscaleError):
    """The student's own text was not written: who writes it was lost, or what it is told is damaged."""


class StreamError(KdscaleError):
    """A request for soft targets could not be served by any endpoint."""


class PayloadError(StreamError):
    """An answer arrived damaged, mislabelled or out of range."""


class CoverageError(KdscaleError):
    """Trained tokens did not get the teacher signal they must have."""


class CanaryError(KdscaleError):
    """The served teacher does not give what a plain forward of the same model gives."""


class CheckpointError(KdscaleError):
    """A checkpoint is damaged, belongs to another run, or could not be written."""


class StorageError(KdscaleError):
    """A URL cannot be read or written."""


class RecordingError(KdscaleError):
    """A recording of soft targets is missing, damaged, or could not be written."""
