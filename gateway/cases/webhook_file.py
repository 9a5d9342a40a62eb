"""Where webhooks lead and what they are signed with: a YAML or JSON file that the operator keeps, named by the setting `webhooks_path`.

    webhooks:
      - name: risk-desk
        url: https://hooks.example.com/fraudgate
        secrets: [whsec_..., whsec_...]
        kinds: [burst]

Each message is signed with every secret, so that a receiver can change from one to the next. `kinds` are the alerts other than decisions
(burst, guard) that it is sent too; decisions come by the routes of the policy. Only http and https, and only what stands in this file, is
ever called: no address comes from a request or a record. Secrets are never logged.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import msgspec
import yaml

from gateway.errors import GatewayError

WEBHOOKS_MAX = 50
SECRETS_MAX = 5
# Of the random bytes behind whsec_, as Standard Webhooks asks.
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 24, 64
URL_LENGTH_MAX = 2000
FILE_BYTES_MAX = 1_000_000
SECRET_PREFIX = "whsec_"  # noqa: S105
KINDS = ("burst", "guard")
_name_match = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}").fullmatch


class WebhookFileError(GatewayError):
    """The file can't be used. The message names the place and never a secret."""

    reason = "webhooks"


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    url: str
    secrets: list[str]
    kinds: list[str] = []


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    webhooks: list[_Written]


@dataclass(frozen=True)
class Webhook:
    """`keys` are the secrets' bytes, `kinds` the alerts beside decisions that it is sent."""

    name: str
    url: str
    keys: tuple[bytes, ...]
    kinds: frozenset[str]

    def __repr__(self) -> str:
        return f"Webhook({self.name})"


def load_webhooks(path: str) -> dict[str, Webhook]:
    """By name; none without a path. Raises `WebhookFileError`."""
    if not path:
        return {}
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise WebhookFileError(f"{path}: more than {FILE_BYTES_MAX} bytes")
        written = msgspec.convert(yaml.safe_load(data), _File)
    except OSError as exc:
        raise WebhookFileError(f"{path}: {exc.strerror}") from exc
    except msgspec.ValidationError as exc:
        raise WebhookFileError(f"{path}: {exc}") from exc
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
        # The parser's own message shows the text around the place.
        mark = getattr(exc, "problem_mark", None)
        raise WebhookFileError(f"{path}: no YAML{'' if mark is None else f', line {mark.line + 1}'}") from None
    if len(written.webhooks) > WEBHOOKS_MAX:
        raise WebhookFileError(f"{path}: more than {WEBHOOKS_MAX} webhooks")
    found: dict[str, Webhook] = {}
    for i, one in enumerate(written.webhooks):
        place = f"{path}: webhook {i + 1}"
        if _name_match(one.name) is None or one.name in found:
            raise WebhookFileError(f"{place}: its name must be its own, of letters, digits, . _ -")
        if set(one.kinds) - set(KINDS):
            raise WebhookFileError(f"{place}: kinds must be of {', '.join(KINDS)}")
        _check_url(one.url, place)
        if not 1 <= len(one.secrets) <= SECRETS_MAX:
            raise WebhookFileError(f"{place}: 1 to {SECRETS_MAX} secrets are needed")
        keys = tuple(key_of(secret, f"{place}, secret {k + 1}") for k, secret in enumerate(one.secrets))
        found[one.name] = Webhook(one.name, one.url, keys, frozenset(one.kinds))
    return found


def _check_url(url: str, place: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        right = False
    if (
        not right
        or len(url) > URL_LENGTH_MAX
        or parts.username is not None
        or not url.isascii()
        or not url.isprintable()
        or " " in url
    ):
        raise WebhookFileError(f"{place}: its url must be http:// or https:// with a host and without a user")


def key_of(secret: str, place: str = "the secret") -> bytes:
    """The bytes of a `whsec_` secret. Raises `WebhookFileError`."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or not SECRET_BYTES_MIN <= len(key) <= SECRET_BYTES_MAX:
        raise WebhookFileError(
            f"{place} must be {SECRET_PREFIX} and {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} random bytes in base64"
        ) from None
    return key


def signatures(keys: tuple[bytes, ...], message_id: str, timestamp_s: int, body: bytes) -> str:
    """The value of `webhook-signature`: one `v1,` signature a key, separated by spaces (Standard Webhooks, "Signature scheme")."""
    signed = f"{message_id}.{timestamp_s}.".encode() + body
    return " ".join("v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in keys)
