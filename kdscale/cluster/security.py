"""The certificates of a run: an authority made for it alone, which ends with the process that made it."""

import datetime
import ipaddress
import secrets

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kdscale.config.sections import StreamSection
from kdscale.credentials import RUN_NAME, Credentials

LIFETIME = datetime.timedelta(days=30)
"""Certificates are checked when a connection opens: after this, a run that loses one must be started again, and goes on
from its newest checkpoint with new certificates."""
# Clocks of nodes differ; a certificate must not lie in the future of the node that checks it.
_CLOCK_SKEW = datetime.timedelta(hours=1)


def needs_tls(stream: StreamSection) -> bool:
    """Whether the listeners of a run use TLS: off loopback always, on loopback when ``stream.tls`` says so."""
    return stream.tls == "always" or not ipaddress.ip_network(stream.network).is_loopback


class Authority:
    """A certificate authority (EC P-256) whose key never leaves this process and is never written."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        # A name of its own, so that a certificate of another run fails as "unknown issuer", not as a broken signature.
        self._name = _name(f"{RUN_NAME} authority {secrets.token_hex(8)}")
        self._certificate = (
            _certificate(self._name, self._name, self._key.public_key(), self._key.public_key(), LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def issue(self, lifetime: datetime.timedelta = LIFETIME) -> Credentials:
        """A fresh key with its certificate, good for listening and for connecting, under ``RUN_NAME``."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _certificate(_name(RUN_NAME), self._name, key.public_key(), self._key.public_key(), lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(RUN_NAME)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Credentials(
            authority_pem=self._certificate.public_bytes(Encoding.PEM).decode(),
            certificate_pem=certificate.public_bytes(Encoding.PEM).decode(),
            key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    """What authority and leaf have in common; the caller adds its own extensions and signs."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
