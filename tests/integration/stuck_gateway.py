"""`fraudgate serve` whose Kafka client gets no more messages and doesn't notice: from the start in each session, or in the first alone.

Run by test_watchdog.py: python -m tests.integration.stuck_gateway always | once
"""

from __future__ import annotations

import sys
import time
from unittest import mock

from deploy.cli import main
from gateway.kafka.link import POLL_S, Link, Membership, Polled

links: list[Link] = []
real_poll = Link.poll


def poll(link: Link) -> tuple[Membership | None, list[Polled]]:
    if link not in links:
        links.append(link)
    if how == "always" or link is links[0]:
        time.sleep(POLL_S)  # sleeps: a client that waits for messages, as the real one would
        return link.membership, []
    return real_poll(link)


if __name__ == "__main__":
    how = sys.argv.pop()
    sys.argv.append("serve")
    with mock.patch.object(Link, "poll", poll):
        sys.exit(main())
