"""Who may talk to a listener of ours: real Flight servers on loopback, certificates of real authorities."""

import datetime
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.flight as fl
import pytest

from kdscale.cluster.security import Authority
from kdscale.config.teachers import ALONE
from kdscale.credentials import RUN_NAME, Credentials
from kdscale.errors import PlacementError, StreamError
from kdscale.stream.directory import DirectoryServer, list_endpoints
from kdscale.stream.protocol import Access, Endpoint, Meaning, call, connect

TOKEN = "the run's token"
AUTHORITY = Authority()
CREDENTIALS = AUTHORITY.issue()
EXPIRED = AUTHORITY.issue(datetime.timedelta(minutes=-1))
MEANING = Meaning("teacher", "tokenizer", 100, 32)
ENDPOINT = Endpoint("replica-0", 0, 0, "127.0.0.1:9")


@pytest.fixture(scope="module")
def directory() -> Iterator[DirectoryServer]:
    server = DirectoryServer("127.0.0.1", 0, TOKEN, {ALONE: MEANING}, CREDENTIALS)
    server.of(ALONE).publish("replica-0", [ENDPOINT])
    yield server
    server.shutdown()


def test_the_runs_own_are_served(directory: DirectoryServer):
    listing = list_endpoints(Access(directory.address, TOKEN, AUTHORITY.issue()))
    assert listing.endpoints == [ENDPOINT]
    assert listing.meaning == MEANING
    assert listing.rebuilding == []


STRANGERS = {
    "plain": None,
    "another authority": Authority().issue(),
    # Knows whom to trust, but was issued by somebody else.
    "another authority's certificate": replace(Authority().issue(), authority_pem=CREDENTIALS.authority_pem),
    "expired": EXPIRED,
    "another's key": replace(CREDENTIALS, key_pem=EXPIRED.key_pem),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_refused_with_the_right_token(directory: DirectoryServer, stranger: str):
    with pytest.raises(StreamError, match=r"does not answer .* take the access file of the teacher that serves now"):
        list_endpoints(Access(directory.address, TOKEN, STRANGERS[stranger]))


def test_no_client_certificate_is_refused(directory: DirectoryServer):
    """Also where the client does not care whom it talks to."""
    for trust in ({"tls_root_certs": CREDENTIALS.authority_pem}, {"disable_server_verification": True}):
        with (
            fl.connect(f"grpc+tls://{directory.address}", override_hostname=RUN_NAME, **trust) as client,
            pytest.raises(fl.FlightUnavailableError),
        ):
            call(client, "endpoints", TOKEN, 10)


def test_certificate_does_not_replace_the_token(directory: DirectoryServer):
    with pytest.raises(StreamError, match="another run's token"):
        list_endpoints(Access(directory.address, "a guess", CREDENTIALS))


@pytest.mark.parametrize(
    "impostor", [None, EXPIRED, Authority().issue()], ids=["plain", "expired", "another authority"]
)
def test_impostors_are_not_asked(impostor: Credentials | None):
    """A listener that is not of the run never sees the token."""
    server = DirectoryServer("127.0.0.1", 0, TOKEN, {ALONE: MEANING}, impostor)
    with pytest.raises(StreamError, match="does not answer over TLS"):
        list_endpoints(Access(server.address, TOKEN, CREDENTIALS))
    server.shutdown()


def test_only_loopback_may_be_plain():
    with pytest.raises(PlacementError, match=r"listener on 192\.0\.2\.7 has no credentials"):
        DirectoryServer("192.0.2.7", 0, TOKEN, {ALONE: MEANING})
    for address in ("192.0.2.7:80", "node.example:80"):
        with pytest.raises(StreamError, match="off loopback the token may not travel plainly"):
            connect(address)
    connect("localhost:9").close()


def test_access_file_carries_credentials(tmp_path: Path):
    file, access = tmp_path / "teacher.json", Access("127.0.0.1:1", "secret", CREDENTIALS)
    access.save(file)
    assert file.stat().st_mode & 0o077 == 0
    assert Access.load(file) == access
    assert repr(access) == "Access(directory='127.0.0.1:1', token=..., tls=True)"
    for wrong in ({"key_pem": "a guess"}, {"key_pem": 3}, {"more": ""}):
        file.write_text(json.dumps({**asdict(access), "credentials": asdict(CREDENTIALS) | wrong}))
        with pytest.raises(StreamError, match="no access file") as raised:
            Access.load(file)
        assert "a guess" not in str(raised.value)
    for wrong in ("[]", '{"directory": "a", "token": "b", "credentials": "c"}'):
        file.write_text(wrong)
        with pytest.raises(StreamError, match="no access file"):
            Access.load(file)
