"""The logger, which knows the role and rank of its process."""

import logging
import sys

_FORMAT = "%(asctime)s %(levelname).1s %(role)s %(message)s"


class _Role(logging.Filter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def filter(self, record: logging.LogRecord) -> bool:
        record.role = self.role
        return True


def setup(role: str, level: str = "INFO") -> None:
    """Send kdscale's log lines to stderr, each with ``role`` (``"driver"``, ``"teacher 0"``, ``"student 1"``)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
    handler.addFilter(_Role(role))
    logger = logging.getLogger("kdscale")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    # Where torchao lies, transformers imports it, and it tells every process which of its GPU kernels this machine has not.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def get(name: str) -> logging.Logger:
    """The logger of one module; ``name`` is its ``__name__``, so it lies under ``kdscale``."""
    return logging.getLogger(name)
