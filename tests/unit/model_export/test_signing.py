"""A gateway's owner who names a public key gets only what the key's owner signed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from gateway.contracts.model_meta import ModelEntry
from model_export.errors import KeyUnreadableError, PackageRefusedError
from model_export.signing import read_public_key, read_signing_key, sign, verify_signature

ENTRY = ModelEntry(
    name="fraudgate",
    version="3",
    directory="fraudgate-3",
    files={"model.onnx": "a" * 64, "golden.npz": "b" * 64, "metadata.json": "c" * 64},
)
KEY = Ed25519PrivateKey.generate()


def signed(entry: ModelEntry) -> ModelEntry:
    return msgspec.structs.replace(entry, signature=sign(entry, KEY))


def test_what_the_key_signed_is_taken_whatever_the_order_of_its_files() -> None:
    entry = signed(ENTRY)
    verify_signature(entry, KEY.public_key())
    verify_signature(msgspec.structs.replace(entry, files=dict(reversed(entry.files.items()))), KEY.public_key())


@pytest.mark.parametrize(
    "changes",
    [
        {"signature": None},
        {"signature": "no hex"},
        {"signature": "00" * 64},
        {"version": "4"},
        {"name": "other"},
        {"files": ENTRY.files | {"model.onnx": "d" * 64}},
        {"files": ENTRY.files | {"explanation.npz": "d" * 64}},
        {"files": {"model.onnx": "a" * 64}},
    ],
)
def test_anything_else_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(PackageRefusedError, match="model .* version"):
        verify_signature(msgspec.structs.replace(signed(ENTRY), **changes), KEY.public_key())


def test_another_keys_signature_is_refused() -> None:
    with pytest.raises(PackageRefusedError, match="not that of the key"):
        verify_signature(signed(ENTRY), Ed25519PrivateKey.generate().public_key())


def test_keys_are_read_from_pem_files(tmp_path: Path) -> None:
    private, public = tmp_path / "model.key", tmp_path / "model.pub"
    private.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    signing, verifying = read_signing_key(str(private)), read_public_key(str(public))
    assert signing is not None
    assert verifying is not None
    verify_signature(msgspec.structs.replace(ENTRY, signature=sign(ENTRY, signing)), verifying)
    assert read_signing_key("") is None
    assert read_public_key("") is None


def test_a_file_that_is_no_such_key_is_named(tmp_path: Path) -> None:
    other = generate_private_key(SECP256R1())
    path = tmp_path / "key"
    for content in (
        b"",
        b"no key",
        other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    ):
        path.write_bytes(content)
        with pytest.raises(KeyUnreadableError, match="FRAUDGATE_MODEL_SIGNING_KEY_PATH.*"):
            read_signing_key(str(path))
        with pytest.raises(KeyUnreadableError, match="FRAUDGATE_MODEL_PUBLIC_KEY_PATH.*"):
            read_public_key(str(path))
    with pytest.raises(KeyUnreadableError, match="nowhere"):
        read_public_key(str(tmp_path / "nowhere"))
