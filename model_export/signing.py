"""Signatures of model packages: Ed25519 over the name, the version and the digest of each file.

The training side signs where the setting `model_signing_key_path` names a private key; a pull with `model_public_key_path` takes only
what that key's owner signed. Keys are PEM files: openssl genpkey -algorithm ed25519 -out model.key; openssl pkey -in model.key
-pubout -out model.pub.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from gateway.contracts.model_meta import ModelEntry, signed_bytes
from model_export.errors import KeyUnreadableError, PackageRefusedError


def read_signing_key(path: str) -> Ed25519PrivateKey | None:
    """The private key at `path`, None for an empty path. Raises `KeyUnreadableError`."""
    if not path:
        return None
    try:
        key = load_pem_private_key(Path(path).expanduser().read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise KeyUnreadableError(f"FRAUDGATE_MODEL_SIGNING_KEY_PATH: no private key can be read at {path}: {exc}") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyUnreadableError(f"FRAUDGATE_MODEL_SIGNING_KEY_PATH: the key at {path} is not an Ed25519 key")
    return key


def read_public_key(path: str) -> Ed25519PublicKey | None:
    """The public key at `path`, None for an empty path. Raises `KeyUnreadableError`."""
    if not path:
        return None
    try:
        key = load_pem_public_key(Path(path).expanduser().read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as exc:
        raise KeyUnreadableError(f"FRAUDGATE_MODEL_PUBLIC_KEY_PATH: no public key can be read at {path}: {exc}") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise KeyUnreadableError(f"FRAUDGATE_MODEL_PUBLIC_KEY_PATH: the key at {path} is not an Ed25519 key")
    return key


def sign(entry: ModelEntry, key: Ed25519PrivateKey) -> str:
    """The signature in hex."""
    return key.sign(signed_bytes(entry)).hex()


def verify_signature(entry: ModelEntry, key: Ed25519PublicKey) -> None:
    """Raises `PackageRefusedError` unless `entry.signature` is the key's over the entry's files."""
    where = f"model {entry.name} version {entry.version}"
    if entry.signature is None:
        raise PackageRefusedError(f"{where} is not signed, and FRAUDGATE_MODEL_PUBLIC_KEY_PATH asks for a signature")
    try:
        key.verify(bytes.fromhex(entry.signature), signed_bytes(entry))
    except (InvalidSignature, ValueError) as exc:
        raise PackageRefusedError(f"{where}: its signature is not that of the key at FRAUDGATE_MODEL_PUBLIC_KEY_PATH") from exc
