"""Certificates for Ray's own TLS, as whoever runs a cluster makes them: one authority, and for each node one with its address."""

import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from kdscale.cluster.security import LIFETIME, Authority, _certificate, _name


def environment(authority: Authority, address: str, directory: Path) -> dict[str, str]:
    """Of a node at ``address``; its files are written to ``directory``."""
    key = ec.generate_private_key(ec.SECP256R1())
    addresses = [x509.IPAddress(ipaddress.ip_address(one)) for one in (address, "127.0.0.1")]
    certificate = (
        _certificate(_name(address), authority._name, key.public_key(), authority._key.public_key(), LIFETIME)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .sign(authority._key, hashes.SHA256())
    )
    files = {
        "CA_CERT": authority._certificate.public_bytes(Encoding.PEM),
        "SERVER_CERT": certificate.public_bytes(Encoding.PEM),
        "SERVER_KEY": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return {"RAY_USE_TLS": "1"} | {f"RAY_TLS_{name}": str(directory / name) for name in files}
