"""Makes a JVM trust the certificate authorities that this system trusts, as Python, pip and uv do.

The Java of a wheel knows only the public authorities of its release; behind a company's proxy it could fetch nothing. Used by
`deploy.jars` for that Java alone: a packaged Java has the system's authorities already.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import struct
from pathlib import Path

# Java key store, version 2, as sun.security.provider.JavaKeyStore reads it: a header, entries, and a SHA-1 over password and data.
MAGIC = 0xFEEDFEED
VERSION = 2
TRUSTED_CERTIFICATE = 2
PASSWORD = "changeit"  # noqa: S105  Java's own default: the store holds nothing secret, the digest only detects damage.
DIGEST_SALT = b"Mighty Aphrodite"
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def system_certificates() -> list[bytes]:
    """The authorities that OpenSSL trusts by default here (SSL_CERT_FILE counts), in DER. Empty when there is no such file."""
    bundle = ssl.get_default_verify_paths().cafile
    if not bundle:
        return []
    return [ssl.PEM_cert_to_DER_cert(pem) for pem in _PEM.findall(Path(bundle).read_text(errors="replace"))]


def key_store(certificates: list[bytes]) -> bytes:
    """A Java key store (JKS) that trusts the certificates, given in DER."""
    data = struct.pack(">III", MAGIC, VERSION, len(certificates))
    for i, certificate in enumerate(certificates):
        created_ms = 0
        data += struct.pack(">I", TRUSTED_CERTIFICATE) + _text(f"authority-{i}") + struct.pack(">Q", created_ms)
        data += _text("X.509") + struct.pack(">I", len(certificate)) + certificate
    return data + hashlib.sha1(PASSWORD.encode("utf-16-be") + DIGEST_SALT + data, usedforsecurity=False).digest()


def java_options(store: Path) -> list[str]:
    """Write the store and return the JVM options that make it the one in use; none where the system names no authorities."""
    certificates = system_certificates()
    if not certificates:
        return []
    store.write_bytes(key_store(certificates))
    prefix = "-Djavax.net.ssl.trustStore"
    return [f"{prefix}={store}", f"{prefix}Type=JKS", f"{prefix}Password={PASSWORD}"]


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack(">H", len(encoded)) + encoded
