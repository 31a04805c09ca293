"""A directory elsewhere, as a replica sees it that has joined: it stays known for as long as it says that it lives."""

import threading
import time
from dataclasses import asdict

from kdscale import log
from kdscale.config.teachers import ALONE
from kdscale.errors import KdscaleError, StreamError
from kdscale.stream.directory import LEASE_S, DirectoryClient, State
from kdscale.stream.protocol import Access, Endpoint, Meaning, require_same_meaning

_LOG = log.get(__name__)
_RENEW_S = LEASE_S / 4
_GONE_S = 15.0


class RemoteRegistry:
    """A ``Registry`` of replicas in this process, kept by the run at ``access``."""

    def __init__(self, access: Access, meaning: Meaning, teacher: str = ALONE) -> None:
        """Raises: StreamError, IdentityError: the run cannot be reached, or does not want such a teacher."""
        self._client = DirectoryClient(access, teacher)
        require_same_meaning(self._client.listing().meaning, meaning)
        self._where = access.directory
        self._meaning = meaning
        self._lock = threading.Lock()
        # Held from looking at states until they are said: what is said last is what holds.
        self._saying = threading.RLock()
        self._states: dict[str, tuple[State, list[Endpoint]]] = {}
        self.fault: KdscaleError | None = None
        """Set when the run has not answered for some time, or has refused a replica."""
        self._answered = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    @property
    def has_hope(self) -> bool:
        with self._lock:
            return any(state != "leaving" for state, _ in self._states.values())

    def publish(self, replica: str, endpoints: list[Endpoint]) -> None:
        """A directory that does not answer now is told again, as long as there is one.

        Raises: IdentityError: the run does not want such a replica.
        """
        try:
            self._set(replica, "serving", endpoints)
        except StreamError as error:
            _LOG.warning("%s could not be published yet: %s", replica, error)

    def withdraw(self, replica: str, *, rebuilding: bool) -> None:
        """A directory that does not answer forgets the replica by itself, when its lease is over."""
        try:
            if rebuilding:
                self._set(replica, "rebuilding", [])
            else:
                with self._saying:
                    with self._lock:
                        known = self._states.pop(replica, None)
                    if known is not None:
                        self._client.ask("leave", LEASE_S, replica=replica)
        except StreamError as error:
            _LOG.warning("%s could not be withdrawn: %s", replica, error)

    def leave(self) -> None:
        """No replica takes requests any more; what they have been asked, they finish."""
        with self._lock:
            states = dict(self._states)
        try:
            for replica, (state, endpoints) in states.items():
                if state == "serving":
                    self._set(replica, "leaving", endpoints)
        except StreamError as error:
            _LOG.warning("the run could not be told that its teacher leaves: %s", error)

    def close(self) -> None:
        self._closed.set()
        self._thread.join(LEASE_S)
        with self._lock:
            left = list(self._states)
        for replica in left:
            self.withdraw(replica, rebuilding=False)
        self._client.close()

    def _set(self, replica: str, state: State, endpoints: list[Endpoint]) -> None:
        with self._saying:
            with self._lock:
                self._states[replica] = (state, endpoints)
            self._say(replica, state, endpoints)

    def _say(self, replica: str, state: State, endpoints: list[Endpoint]) -> None:
        self._client.ask(
            *("register", LEASE_S),
            replica=replica,
            state=state,
            endpoints=[asdict(endpoint) for endpoint in endpoints],
            meaning=asdict(self._meaning),
        )
        self._answered = time.monotonic()

    def _renew(self) -> None:
        while not self._closed.wait(_RENEW_S):
            try:
                self._renew_once()
            except StreamError as error:
                silent_s = time.monotonic() - self._answered
                if silent_s > _GONE_S:
                    self.fault = StreamError(
                        f"the run's directory at {self._where} is gone for {silent_s:.0f} s: {error}"
                    )
                    return
            except KdscaleError as error:
                self.fault = error
                return

    def _renew_once(self) -> None:
        """Raises: KdscaleError."""
        with self._saying:
            with self._lock:
                states = dict(self._states)
            for replica, (state, endpoints) in states.items():
                self._say(replica, state, endpoints)
        if not states:
            # Nothing to say yet; whether the run still wants us shows all the same.
            self._client.listing()
            self._answered = time.monotonic()
