"""The console in a real browser, on a real gateway with real Kafka and Redis: clicked through, read by axe, and while parts of it fail."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer
from playwright.sync_api import Browser, Page, expect

from deploy.stack import Stack
from feature_jobs.alert_topic import Alert, encode
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import ALERTS, LIBRDKAFKA_PARTITIONER
from gateway.contracts.wire import frame
from tests.helpers import running_command, wait_until
from tests.integration.console_helpers import (
    WIDTHS,
    Payments,
    Shown,
    ask,
    browsing,
    grave_findings,
    looking,
    overflows,
    picture,
    shown,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

WITHIN_MS = 60_000
# What is clicked answers within milliseconds, on a machine that does nothing else.
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def watched(stack: Stack, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """Payments come, reviews wait, keys are asked for."""
    with shown(settings, tmp_path_factory.mktemp("console"), keys=True) as found, Payments(found.settings, key=found.key):
        yield found


def level(page: Page, *levels: str) -> None:
    """Wait until the sentence on top is of one of these."""
    expect(page.locator("#verdict")).to_have_attribute("data-level", re.compile(f"^({'|'.join(levels)})$"), timeout=WITHIN_MS)


def says(page: Page, text: str) -> None:
    expect(page.locator("#sentence")).to_contain_text(text, timeout=WITHIN_MS)


def part(page: Page, name: str, level: str) -> None:
    expect(page.locator(f'#pipeline g[data-part="{name}"]')).to_have_attribute("data-level", level, timeout=WITHIN_MS)


def send_alert(settings: Settings, kind: str, detail: str) -> None:
    schema_id = SchemaRegistry(settings.registry, settings.schemas_path).id_of(ALERTS)
    producer = Producer({"bootstrap.servers": settings.bootstrap, "partitioner": LIBRDKAFKA_PARTITIONER})
    producer.produce(ALERTS, frame(schema_id, encode(Alert(decided_at_ms=1_795_000_000_000, kind=kind, detail=detail))), kind)
    assert producer.flush(30) == 0


def test_without_a_key_the_page_is_there_and_shows_nothing_of_a_payment(watched: Shown, browser: Browser) -> None:
    nobody = Shown(watched.settings, watched.gateway, "")
    with looking(browser, nobody) as page:
        expect(page.get_by_role("dialog", name="API key")).to_be_visible()
        says(page, "send an API key that is in force")
        page.get_by_role("button", name="Cancel").click()
        assert page.locator("#decisions tbody tr").count() == 0
        page.get_by_role("button", name="API key").click()
        page.locator("#key-value").fill("fg_wrong")
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#key-error")).to_contain_text("not in force")
        page.locator("#key-value").fill(watched.key)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#decisions tbody tr").first).to_be_visible()
        assert (
            page.evaluate("Object.keys(localStorage).filter((k) => k.includes('key') && localStorage[k].startsWith('fg_'))") == []
        )
        page.reload()
        expect(page.locator("#decisions tbody tr").first).to_be_visible()


def test_everything_is_there_and_can_be_clicked_through(watched: Shown, browser: Browser) -> None:
    with looking(browser, watched) as page:
        # No feature jobs run here, and the console says so: decisions are made as they should be.
        level(page, "watch", "degraded")
        part(page, "kafka", "well")
        expect(page.locator("#throughput-now")).to_have_text(re.compile(r"[1-9]\d* ?a second"), timeout=WITHIN_MS)
        expect(page.locator("#latency-now")).to_contain_text("ms")
        expect(page.locator("#outcomes tbody tr")).to_have_count(4)
        expect(page.locator("#tables tbody tr")).to_have_count(3)
        expect(page.locator("#tables")).to_contain_text("not heard of yet: nobody listens")
        expect(page.locator("#routes tbody tr")).to_have_count(2)
        expect(page.locator("#routes .hist").first).to_be_visible()
        expect(page.locator("#inuse")).to_contain_text("fraudgate 1")
        expect(page.locator("#alerts li").first).to_be_visible(timeout=WITHIN_MS)
        send_alert(watched.settings, "burst", "31 declines at shop-4 within 600 s")
        bursts = page.locator('#alerts li[data-kind="burst"]')
        expect(bursts.filter(has_text="31 declines at shop-4").first).to_be_visible(timeout=WITHIN_MS)
        for summary in page.get_by_text("As a table").all():
            summary.click()
        expect(page.locator("#pipeline-table tbody tr")).to_have_count(5)
        assert page.locator("#latency-table tbody tr").count() >= 1

        page.get_by_label("only what isn't approved").check()
        expect(page.locator('#decisions .pill[data-outcome="approve"]')).to_have_count(0)
        button = page.locator("#decisions button.id").first
        transaction_id = button.text_content() or ""
        button.click()
        story = page.get_by_role("dialog", name=transaction_id)
        expect(story).to_contain_text(f"fraudgate why {transaction_id}")
        expect(story).to_contain_text("Reasons")
        assert story.locator("tbody tr").count() > 80
        page.locator("#feature-filter").fill("card_count")
        assert 0 < story.locator("tbody tr").count() < 20
        picture(page, "story", whole=False)
        assert grave_findings(page) == []
        page.keyboard.press("Escape")
        expect(story).to_be_hidden()
        # The list stood still while it was looked at, and goes on.
        expect(page.locator("#decisions-note")).to_contain_text("since somebody watches")

        page.keyboard.press("?")
        expect(page.get_by_role("dialog", name="Help")).to_be_visible()
        picture(page, "help", whole=False)
        page.get_by_role("button", name="Close Esc").last.click()
        for name in ("Colours: light", "Colours: dark"):
            page.keyboard.press("t")
            expect(page.locator("#theme")).to_have_text(name)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"


def test_an_analyst_decides_reviews_with_the_keyboard_alone(watched: Shown, browser: Browser) -> None:
    with looking(browser, watched) as page:
        items = page.locator("#reviews li[data-id]")
        expect(items.nth(1)).to_be_visible(timeout=WITHIN_MS)
        page.keyboard.press("j")
        page.keyboard.press("j")
        current = page.locator('#reviews li[aria-current="true"]')
        chosen = current.get_attribute("data-id") or ""
        page.keyboard.press("c")
        held = page.locator(f'#reviews li[data-id="{chosen}"]')
        expect(held).to_contain_text("held by ann")
        page.keyboard.press("u")
        expect(held).not_to_contain_text("held by")
        held.get_by_role("button", name="Story").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog", name=chosen)).to_contain_text("Features (")
        page.keyboard.press("Escape")
        held.locator("button").first.focus()
        page.keyboard.press("f")
        dialog = page.get_by_role("dialog", name="It is fraud")
        expect(dialog).to_contain_text(chosen)
        page.keyboard.type("the holder was at home")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(held).to_have_count(0)
        status, told = ask(watched.settings.host, watched.settings.cases_port, "GET", f"/v1/reviews/{chosen}", key=watched.key)
        assert status == 200
        review = told["review"]
        assert (review["verdict"], review["verdict_who"], review["note"]) == ("fraud", "ann", "the holder was at home")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_can_be_read_by_everybody_at_either_width_in_light_and_dark(
    watched: Shown, browser: Browser, width: str, scheme: str
) -> None:
    with looking(browser, watched, width=width, scheme=scheme) as page:
        expect(page.locator("#decisions tbody tr").nth(3)).to_be_visible(timeout=WITHIN_MS)
        expect(page.locator("#reviews li[data-id]").first).to_be_visible(timeout=WITHIN_MS)
        expect(page.locator("#pipeline svg")).to_be_visible()
        picture(page, f"{width}-{scheme}")
        assert grave_findings(page) == []
        assert overflows(page) == []
        # Landmarks and headings, as a screen reader goes through them.
        for role in ("banner", "main", "contentinfo"):
            expect(page.get_by_role(role)).to_have_count(1)
        expect(page.get_by_role("heading", level=1)).to_have_count(1)
        assert page.get_by_role("heading", level=2).count() >= 10
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") in ("skip", "")


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.timeout(1200)
def test_what_fails_is_told_at_once_and_what_comes_back_too(
    stack: Stack, settings: Settings, browser: Browser, tmp_path: Path
) -> None:
    """Feature jobs, Redis, Kafka and the gateway itself are taken away, one after the other, before somebody's eyes."""
    with shown(settings, tmp_path, keys=False) as found, Payments(found.settings) as payments:
        with looking(browser, found) as page, running_command(found.settings, "jobs", log_path=tmp_path / "jobs.log") as jobs:
            expect(page.locator("#tables")).to_contain_text(re.compile("[1-9] of [1-9] streams run"), timeout=300_000)
            expect(page.locator("#tables tbody tr").nth(2)).to_contain_text(re.compile("fresh|late"), timeout=300_000)
            part(page, "features", "well")
            picture(page, "fault-before")

            jobs.kill()
            says(page, "the feature jobs don't answer")
            part(page, "store", "watch")
            expect(page.locator("#tables")).to_contain_text(re.compile(r"As the feature jobs said \d+ s ago"))
            picture(page, "fault-jobs")

            stack.stop(["redis"])
            try:
                says(page, "Degraded: Redis doesn't answer, decisions without history")
                part(page, "features", "degraded")
                expect(page.locator("#outcomes")).to_contain_text("request only", timeout=WITHIN_MS)
                picture(page, "fault-redis")
            finally:
                stack.start(["redis"])
            expect(page.locator("#sentence")).not_to_contain_text("Redis", timeout=WITHIN_MS)
            part(page, "features", "well")

            stack.stop(["kafka"])
            try:
                expect(page.locator("#troubles, #sentence").filter(has_text="Kafka can't be reached").first).to_be_visible(
                    timeout=WITHIN_MS
                )
                part(page, "kafka", "degraded")
                picture(page, "fault-kafka")
            finally:
                stack.start(["kafka"])
            part(page, "kafka", "well")

            failed = payments.failed
            found.gateway.send_signal(signal.SIGSTOP)
            try:
                says(page, "Down: no word from the gateway")
                expect(page.locator("#pulse")).to_contain_text("no word for")
                assert page.locator("body").get_attribute("data-lost") == ""
                picture(page, "fault-gateway")
            finally:
                found.gateway.send_signal(signal.SIGCONT)
            level(page, "watch", "degraded", "well")
            wait_until(lambda: payments.sent > failed, 30, "payments go on")
