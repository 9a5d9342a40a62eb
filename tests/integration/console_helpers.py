"""A gateway and a case service with something to show, and a browser that looks at their console."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from deploy.ports import free_ports
from gateway.api_keys import create_key
from gateway.contracts.model_meta import read_manifest, write_manifest
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import encode_json
from gateway.http.door import SCORE_PATH
from tests.helpers import RunningCommand, running_command
from tests.integration.gateway_helpers import make_transaction, name, ready_without
from tests.unit.gateway.factories import write_model

READY_WITHIN_S = 60
PICTURES = Path("build/console")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]
WIDTHS = {"wide": (1280, 800), "narrow": (390, 844)}
GRAVE = {"serious", "critical"}


@dataclasses.dataclass
class Shown:
    """What is looked at. `key` is an analyst's, "" where nobody is asked for one."""

    settings: Settings
    gateway: RunningCommand
    key: str

    @property
    def url(self) -> str:
        return f"{self.settings.gateway}/console/"


def ask(host: str, port: int, method: str, path: str, body: bytes | None = None, *, key: str = "") -> tuple[int, dict[str, Any]]:
    """(status, decoded JSON) of one call with an API key. Raises OSError when nobody listens."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request(method, path, body, {"Authorization": f"Bearer {key}"} if key else {})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


class Payments:
    """A few payments a second over HTTP, of all kinds, until the block ends. What fails is counted and no matter."""

    def __init__(self, settings: Settings, per_s: float = 25.0, key: str = "") -> None:
        self._settings, self._key = settings, key
        self._pause_s = 1 / per_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self.sent = self.failed = 0

    def __enter__(self) -> Payments:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _send(self) -> None:
        rng = random.Random(8)
        run, host, port = name("pay"), self._settings.host, self._settings.gateway_port
        while not self._stopping.wait(self._pause_s):
            self.sent += 1
            now_ms = time.time_ns() // 1_000_000
            # Most are small, one in ten is risky by the model of write_model.
            minor = rng.choice([rng.randrange(300, 9_000)] * 9 + [60_000])
            called = f"{run}-{self.sent}"
            changes: dict[str, Any] = {"card_id": f"card-{rng.randrange(5000)}", "merchant_id": f"shop-{rng.randrange(9)}"}
            if self.sent % 20 in (7, 8):
                # A card that is in two places within a minute needs a person by the shipped policy.
                first = self.sent % 20 == 7
                place = {"latitude": 52.5, "longitude": 13.4} if first else {"latitude": -33.9, "longitude": 151.2}
                now_ms -= 60_000 if first else 0
                changes |= {"card_id": f"{run}-traveller-{self.sent // 20}", **place}
                minor = 4_200
            t = make_transaction(called, now_ms, amount_minor=minor, **changes)
            try:
                status, _ = ask(host, port, "POST", SCORE_PATH, encode_json(t), key=self._key)
            except OSError:
                status = 0
            self.failed += status != 200


@contextlib.contextmanager
def shown(settings: Settings, folder: Path, *, keys: bool, **changes: Any) -> Iterator[Shown]:
    """A gateway with champion and challenger, and a case service, of their own."""
    gateway_port, cases_port = free_ports(2)
    model_dir = folder / "models"
    routes = {
        route: write_model(model_dir, str(i + 1), seed=i + 1).routes["champion"]
        for i, route in enumerate(("champion", "challenger"))
    }
    write_manifest(model_dir, msgspec.structs.replace(read_manifest(model_dir), routes=routes))
    key, path = "", ""
    if keys:
        path = str(folder / "keys.json")
        key, _ = create_key(Path(path), "ann", ["review", "score"], 1000)
    own = dataclasses.replace(
        settings,
        **{
            "home": str(folder / "home"),
            "gateway_port": gateway_port,
            "cases_port": cases_port,
            "model_dir": str(model_dir),
            "instance_id": name("shown"),
            "consumer_group": name("shown"),
            "cases_group": name("shown"),
            "feature_budget_ms": 1000,
            "decision_budget_ms": 3000,
            "publish_budget_ms": 1000,
            "api_keys_path": path,
            **changes,
        },
    )
    # Schemas are known by the registry; who starts while it is down knows them by this copy.
    shutil.copytree(settings.schemas_path, own.schemas_path, dirs_exist_ok=True)
    with (
        running_command(own, "cases", log_path=folder / "cases.log") as cases,
        running_command(own, "serve", log_path=folder / "gateway.log") as gateway,
    ):
        gateway.wait_until(lambda: ready_without(own, "redis", "model", "kafka"), READY_WITHIN_S, "the gateway is ready")
        assert cases.alive
        yield Shown(own, gateway, key)


def chromium() -> str:
    """Where it is. Without it the test is skipped, but on CI it fails."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        message = "there is no chromium on PATH: as root, apt-get install chromium (make setup does)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def looking(browser: Browser, at: Shown, *, width: str = "wide", scheme: str = "light") -> Iterator[Page]:
    """A page of its own. It must say nothing wrong on its own console: a refused script or style says so there."""
    across, down = WIDTHS[width]
    context = browser.new_context(
        viewport={"width": across, "height": down}, color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce"
    )
    said: list[str] = []

    def note(message: ConsoleMessage) -> None:
        # What the browser notes of a server that is gone or refuses is what the page is told, and shows.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            said.append(message.text)

    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("console", note)
    page.on("pageerror", lambda error: said.append(str(error)))
    try:
        page.goto(at.url)
        if at.key:
            page.locator("#key-value").fill(at.key)
            page.get_by_role("button", name="Use it").click()
        yield page
        assert said == []
    finally:
        context.close()


def picture(page: Page, called: str, *, whole: bool = True) -> None:
    """Kept as build output: the whole page, or what a window shows of it."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{called}.png", full_page=whole)


def grave_findings(page: Page) -> list[str]:
    """What axe finds serious or critical, with the place."""
    found = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:160]}"
        for violation in found
        if violation["impact"] in GRAVE
        for node in violation["nodes"]
    ]


def overflows(page: Page) -> list[str]:
    """Elements that are wider than the window, in which nobody can scroll sideways."""
    found: list[str] = page.evaluate(
        """() => {
          const width = document.documentElement.clientWidth;
          return [...document.querySelectorAll("body *")].filter((e) => {
            if (e.closest(".scroll, dialog:not([open]), .unseen, svg") || getComputedStyle(e).position === "absolute") return false;
            return e.getBoundingClientRect().right > width + 1;
          }).map((e) => `${e.tagName}#${e.id}.${e.className}`);
        }"""
    )
    return found
