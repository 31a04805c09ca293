import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder as Policy
from cryptography.x509.verification import Store, VerificationError

from kdscale.cluster.security import LIFETIME, Authority, needs_tls
from kdscale.config.sections import StreamSection
from kdscale.credentials import RUN_NAME, Credentials


def certificates(credentials: Credentials) -> tuple[x509.Certificate, x509.Certificate]:
    """Authority and leaf."""
    authority, leaf = (
        x509.load_pem_x509_certificate(pem.encode()) for pem in (credentials.authority_pem, credentials.certificate_pem)
    )
    return authority, leaf


@pytest.mark.parametrize(
    ("network", "tls", "needed"),
    [
        ("127.0.0.0/8", "auto", False),
        ("127.0.0.1/32", "auto", False),
        ("127.0.0.0/8", "always", True),
        ("10.0.0.0/8", "auto", True),
        # Wider than loopback: a node may well take another address of it.
        ("126.0.0.0/7", "auto", True),
        ("0.0.0.0/0", "auto", True),
    ],
)
def test_tls_is_off_on_loopback_alone(network: str, tls: str, needed: bool):
    assert needs_tls(StreamSection.model_validate({"network": network, "tls": tls})) is needed


def test_leaf_serves_and_connects_under_the_runs_name():
    """Checked by rules stricter than a handshake's, for either use."""
    authority, leaf = certificates(Authority().issue())
    policy = Policy().store(Store([authority]))
    policy.build_server_verifier(x509.DNSName(RUN_NAME)).verify(leaf, [])
    policy.build_client_verifier().verify(leaf, [])
    with pytest.raises(VerificationError):
        policy.build_server_verifier(x509.DNSName("another-name")).verify(leaf, [])
    other, _ = certificates(Authority().issue())
    with pytest.raises(VerificationError):
        Policy().store(Store([other])).build_client_verifier().verify(leaf, [])
    with pytest.raises(VerificationError):
        policy.time(leaf.not_valid_after_utc + datetime.timedelta(seconds=1)).build_client_verifier().verify(leaf, [])


def test_leaf_cannot_issue():
    _, leaf = certificates(Authority().issue())
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_keys_are_the_leafs_own():
    authority = Authority()
    one, other = authority.issue(), authority.issue()
    assert one.authority_pem == other.authority_pem
    assert one.key_pem != other.key_pem
    key = load_pem_private_key(one.key_pem.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    (issuer, leaf) = certificates(one)
    assert key.public_key() == leaf.public_key() != issuer.public_key()


def test_certificates_live_from_before_now_for_their_time():
    now = datetime.datetime.now(datetime.UTC)
    for certificate in certificates(Authority().issue()):
        assert certificate.not_valid_before_utc < now - datetime.timedelta(minutes=30)
        assert abs(certificate.not_valid_after_utc - now - LIFETIME) < datetime.timedelta(minutes=1)
    _, expired = certificates(Authority().issue(datetime.timedelta(minutes=-1)))
    assert expired.not_valid_after_utc < now


def test_credentials_show_nothing():
    credentials = Authority().issue()
    assert repr(credentials) == "Credentials(...)"
    with pytest.raises(ValueError, match="key_pem holds no PEM block") as raised:
        Credentials(credentials.authority_pem, credentials.certificate_pem, "guess")
    assert "guess" not in str(raised.value)
