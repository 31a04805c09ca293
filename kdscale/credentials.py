"""What one side of a mutually authenticated connection holds. A plain value: it is made in ``cluster/security.py``."""

from dataclasses import dataclass

RUN_NAME = "kdscale-run"
"""The one name in every certificate of a run. Who connects checks this name instead of the address, so certificates can be
made before it is known where ranks will listen; what tells one run from another is its authority."""

ACCESS_FILE = "access.json"
"""In the directory of a run in progress: what opens its teacher to those who may read it (``stream.protocol.Access``)."""


@dataclass(frozen=True)
class Credentials:
    """A certificate of the run with its key, and the authority against which the other side's is checked. All PEM."""

    authority_pem: str
    certificate_pem: str
    key_pem: str

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field that is not PEM, never what it holds."""
        for name, label in (("authority", "CERTIFICATE"), ("certificate", "CERTIFICATE"), ("key", "PRIVATE KEY")):
            value = getattr(self, f"{name}_pem")
            if not isinstance(value, str) or not value.startswith(f"-----BEGIN {label}-----\n"):
                raise ValueError(f"credentials: {name}_pem holds no PEM block {label!r}")

    def __repr__(self) -> str:
        return "Credentials(...)"


@dataclass(frozen=True)
class Keys:
    """What opens a door of the run: certificates, and the token besides."""

    credentials: Credentials
    token: str

    def __repr__(self) -> str:
        return "Keys(...)"
