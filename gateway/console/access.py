"""Who may look at the console, and what every one of its answers says to a browser.

The page itself holds nothing and is given to everybody. What it shows has entity tokens in it: with API keys configured it is for a key of
scope `review` or `admin`; without, for this machine alone, or for everybody where the setting `console_access` says `open`.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from gateway.api_keys import KeyBook, presented
from gateway.contracts.settings import CONSOLE_OPEN
from gateway.errors import ForbiddenError

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
# Nothing from elsewhere, nothing inline, nobody frames it, and it tells nobody where it was.
SECURITY_HEADERS: dict[str, str] = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class NotHereError(ForbiddenError):
    """Without API keys the console is for the machine it runs on."""

    reason = "console_not_here"
    text = (
        "without API keys the console is for browsers on this machine: set FRAUDGATE_API_KEYS_PATH, or FRAUDGATE_CONSOLE_ACCESS=open"
        " where everybody who reaches this port may see it"
    )


class OtherSiteError(ForbiddenError):
    """A page of another site asks, through somebody's browser."""

    reason = "other_site"
    text = "the console is asked by its own pages alone"


class Access:
    """`keys` is None where none are configured."""

    def __init__(self, keys: KeyBook | None, setting: str) -> None:
        self._keys = keys
        self._open = setting == CONSOLE_OPEN

    @property
    def asks_for_key(self) -> bool:
        return self._keys is not None and not self._open

    def check(self, headers: Mapping[str, str], client: str | None) -> str:
        """Whose key it is, "" where none is asked for.

        Raises `UnauthorizedError`, `ForbiddenError`, `RateLimitedError`, `NotHereError`, `OtherSiteError`.
        """
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise OtherSiteError
        if self._open:
            return ""
        if self._keys is None:
            # A name that somebody else's DNS has led here is no name of this machine.
            if client not in LOOPBACK or urlsplit(f"//{host}").hostname not in LOOPBACK:
                raise NotHereError
            return ""
        found = [headers.get(name) for name in ("authorization", "x-api-key")]
        authorization, x_api_key = (None if value is None else value.encode("latin-1") for value in found)
        key = presented(authorization, x_api_key)
        try:
            return self._keys.check(key, "review").name
        except ForbiddenError:
            return self._keys.check(key, "admin").name
