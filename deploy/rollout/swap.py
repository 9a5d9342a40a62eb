"""One version of the gateway takes the traffic of the other, and gives it back when it does badly. Called by `fraudgate deploy`.

The order is what makes it unnoticed. The new version starts and is asked until it is ready, and able to do all the old one does; the proxy
takes it in, for a share of the requests first, and repeats at the old one what fails; the old one is given nothing more and finishes; the
consumer group passes over; the new one is watched; only then does the old one end. Until that moment the old one can take everything back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from deploy import processes
from deploy.rollout import watch
from deploy.rollout.proxy import DRAIN, MAINT, READY, Proxy, ServerStat, socket_path
from deploy.rollout.state import (
    BLUE,
    SERVICE_OF,
    RolloutError,
    State,
    Version,
    own_version,
    port_of,
    read_state,
    write_state,
)
from deploy.stack import Say, Stack, StackError
from gateway.contracts.audit import append_audit
from gateway.contracts.settings import Settings

POLL_S = 0.1
LOOK_S = 0.5
UP_WITHIN_S = 15.0
# Longer than a request may take (FRAUDGATE_REQUEST_TIMEOUT_MS): what is still there then hangs.
DRAIN_WITHIN_S = 30.0
# A chunk under way is finished and committed first; then the new member's session and its producers begin.
HANDOVER_WITHIN_S = 45.0
BASELINE_S = 2.0
SUBJECT = "gateway"
# Of what a version said when it died.
REASON_CHARS_MAX = 4000


@dataclass(frozen=True)
class Plan:
    """How careful a deploy is. Seconds; `p99_s_max` None: the promise, or twice what the old version took."""

    ready_s: float = 120.0
    canary_percent: int = 10
    canary_s: float = 5.0
    bake_s: float = 15.0
    failed_share_max: float = 0.01
    p99_s_max: float | None = None
    reason: str = ""
    action: str = "deploy"


class Swap:
    """One deploy. `say` is told each step with the seconds since the beginning."""

    def __init__(self, settings: Settings, stack: Stack, plan: Plan, say: Say, nap: Callable[[float], None] = time.sleep) -> None:
        self._settings, self._stack, self._plan, self._say, self._nap = settings, stack, plan, say, nap
        self._proxy = Proxy(socket_path(settings))
        self._began_s = time.monotonic()

    def run(self, version: Version) -> State:
        """The state afterwards. Raises `RolloutError` when the new version doesn't serve; the message says what does."""
        before = self._prepare()
        old, new = before.active, before.other
        former = before.versions[old]
        write_state(self._settings.home_path, msgspec.structs.replace(before, trial=version))
        old_serves = self._serves(old)
        try:
            self._start(new)
            self._wait_able(old, new)
            bounds = watch.Bounds(self._plan.failed_share_max, self._p99_max(old))
            self._take_in(new, old_serves)
            if old_serves and self._plan.canary_s:
                self._watch(new, self._plan.canary_s, bounds, f"{self._plan.canary_percent} % of the requests")
            self._take_out(old, new, old_serves)
            self._hand_over(old, new, old_serves)
            self._watch(new, self._plan.bake_s, bounds, "all requests")
        except (RolloutError, StackError, OSError, KeyboardInterrupt) as exc:
            why = "it was interrupted" if isinstance(exc, KeyboardInterrupt) else str(exc)
            after = self._give_back(before, new, old_serves)
            self._note("deploy_failed", former, former, f"{version.told()}: {why}")
            raise RolloutError(f"the new version does not serve: {why}\n{after}") from exc
        done = State(active=new, versions=before.versions | {new: version})
        write_state(self._settings.home_path, done)
        self._retire(old)
        self._note(self._plan.action, former, version, self._plan.reason)
        self._step(f"{new} serves, {self._proxy_url} is the address for callers")
        return done

    def settle(self, state: State) -> State:
        """Make true what `state` says after a deploy that broke off: the active version has all traffic, the other has ended."""
        active, other = state.active, state.other
        if self._stack.pid("proxy") is None:
            self._stack.start(["proxy"])
        trial = "nothing had broken off" if state.trial is None else f"a deploy had broken off, of {state.trial.told()}"
        self._step(f"{trial}: {active} gets everything back")
        self._step(self._give_back(state, other, self._stack.pid(SERVICE_OF[active]) is not None))
        return State(active=active, versions=state.versions)

    def _prepare(self) -> State:
        """The state to begin from: adopts the gateway that `fraudgate up` started, starts the proxy."""
        settings, stack = self._settings, self._stack
        state = read_state(settings.home_path)
        if state is None:
            if stack.pid(SERVICE_OF[BLUE]) is None:
                raise RolloutError("no gateway runs here whose place a new version could take: fraudgate up --all")
            state = State(active=BLUE, versions={BLUE: own_version(settings)})
            write_state(settings.home_path, state)
            self._step(f"the gateway on port {settings.gateway_port} is {BLUE}")
        if stack.pid("proxy") is None:
            stack.start(["proxy"])
            self._step(f"the proxy listens at {self._proxy_url}")
        if state.trial is not None:
            state = self.settle(state)
        found = watch.readiness(self._url(state.active))
        if found is not None and found.consuming is None:
            raise RolloutError(
                f"the gateway in {state.active} is of a version that can't hand over its consumer group: end it and start one of today's"
            )
        self._look_for(state.active)
        return state

    def _look_for(self, slot: str) -> None:
        """Give the proxy time to find the gateway in `slot` up. One that hangs or died is what a new version is wanted for: no error."""
        try:
            self._wait(lambda: self._proxy.stats()[slot].up, UP_WITHIN_S, "", slot)
        except (RolloutError, TimeoutError):
            self._step(f"{slot} does not serve, and can take nothing back")

    def _serves(self, slot: str) -> bool:
        return self._stack.pid(SERVICE_OF[slot]) is not None and self._proxy.stats()[slot].up

    def _start(self, new: str) -> None:
        name = SERVICE_OF[new]
        # Of an earlier deploy; nothing is sent to it.
        self._proxy.set_state(new, MAINT)
        self._stack.stop([name])
        self._stack.services[name] = dataclasses.replace(self._stack.services[name], ready_within_s=self._plan.ready_s)
        self._step(f"{new} starts on port {port_of(self._settings, new)}")
        self._stack.start([name])
        self._step(f"{new} is ready")

    def _wait_able(self, old: str, new: str) -> None:
        """A version that is ready but does without Redis, a model or the lists, which the old one has, waits for them."""

        def lacks() -> frozenset[str]:
            theirs, ours = watch.readiness(self._url(old)), watch.readiness(self._url(new))
            if ours is None or not ours.ready:
                return frozenset({"readiness"})
            # In no group yet: that comes last.
            return ours.degraded - {"kafka"} - (theirs.degraded if theirs is not None else ours.degraded)

        try:
            self._wait(lambda: not lacks(), self._plan.ready_s, "", new)
        except TimeoutError as exc:
            raise RolloutError(f"it does without {', '.join(sorted(lacks()))}, which the old version has") from exc

    def _p99_max(self, old: str) -> float:
        """What the new version may take. Looks at the old one for BASELINE_S when nothing was said."""
        if self._plan.p99_s_max is not None:
            return self._plan.p99_s_max
        before = watch.latency(self._url(old))
        self._nap(BASELINE_S)
        return watch.p99_bound_s(watch.p99_s(watch.since(before, watch.latency(self._url(old)))))

    def _take_in(self, new: str, shares: bool) -> None:
        self._proxy.set_weight(new, self._plan.canary_percent if shares and self._plan.canary_s else 100)
        self._proxy.set_state(new, READY)
        self._wait(lambda: self._proxy.stats()[new].up, UP_WITHIN_S, "the proxy finds it up", new)
        self._step(f"{new} is up for the proxy")

    def _take_out(self, old: str, new: str, old_serves: bool) -> None:
        self._proxy.set_weight(new, 100)
        if not old_serves:
            return
        self._proxy.set_state(old, DRAIN)
        self._drained(old)

    def _drained(self, slot: str) -> None:
        """Wait for the requests under way. Those that hang are left to the gateway's own end."""
        try:
            self._wait(lambda: not self._proxy.stats()[slot].sessions, DRAIN_WITHIN_S, "", slot)
            self._step(f"{slot} has answered its last request")
        except TimeoutError:
            self._step(
                f"{slot} still has {self._proxy.stats()[slot].sessions} requests after {DRAIN_WITHIN_S:.0f} s, which are given up"
            )

    def _hand_over(self, old: str, new: str, old_serves: bool) -> None:
        """The consumer group passes to the new version. It joins under the same name when the other has left: nothing is rebalanced."""
        reaches_kafka = False
        if old_serves:
            theirs = self._asked(old)
            if not theirs.consuming:
                # Started without the transactions topic, and so is whatever takes its place.
                return
            reaches_kafka = "kafka" not in theirs.degraded
            self._leave_group(old)
        else:
            # It may hang and be in the group all the same, where two of one name fence each other.
            self._stack.stop([SERVICE_OF[old]])
        self._join_group(new)
        if reaches_kafka:
            self._wait(lambda: self._consumes(new), HANDOVER_WITHIN_S, f"{new} consumes the transactions topic", new)
            self._step(f"{new} consumes the transactions topic")
        else:
            self._step(f"{new} joins the consumer group as soon as Kafka answers")

    def _asked(self, slot: str) -> watch.Readiness:
        """What the gateway in `slot` says. A busy one is asked again: silence doesn't mean that it is in no group."""
        told: list[watch.Readiness] = []

        def answers() -> bool:
            found = watch.readiness(self._url(slot))
            told.extend([found] if found is not None else [])
            return bool(told)

        self._wait(answers, UP_WITHIN_S, f"{slot} answers at {self._url(slot)}", slot)
        return told[-1]

    def _consumes(self, slot: str) -> bool:
        found = watch.readiness(self._url(slot))
        return found is not None and bool(found.consuming) and "kafka" not in found.degraded

    def _leave_group(self, slot: str) -> None:
        def has_left() -> bool:
            found = watch.readiness(self._url(slot))
            return found is not None and not found.consuming

        self._signal(slot, signal.SIGUSR2)
        self._wait(has_left, HANDOVER_WITHIN_S, f"{slot} has left the consumer group", slot)

    def _join_group(self, slot: str) -> None:
        self._signal(slot, signal.SIGUSR1)

    def _signal(self, slot: str, number: signal.Signals) -> None:
        record = self._stack.record(SERVICE_OF[slot])
        if record is not None:
            processes.send_signal(record, number, group=False)

    def _watch(self, new: str, seconds: float, bounds: watch.Bounds, share: str) -> None:
        """Raises `RolloutError` as soon as the new version does worse than `bounds`, or ends."""
        before, answered = self._proxy.stats()[new], watch.latency(self._url(new))
        end_s = time.monotonic() + seconds
        now: ServerStat = before
        answers: watch.Histogram = {}
        while (left_s := end_s - time.monotonic()) > 0:
            self._nap(min(LOOK_S, left_s))
            self._check_alive(new)
            now = self._proxy.stats()[new]
            answers = watch.since(answered, watch.latency(self._url(new)))
            why = watch.complaint(before, now, answers, bounds)
            if why is not None:
                raise RolloutError(why)
        p99 = watch.p99_s(answers)
        told = "too few to tell p99" if p99 is None else f"p99 at most {p99 * 1000:.0f} ms"
        failed = now.failed + now.repeated - before.failed - before.repeated
        self._step(f"{new} was watched for {seconds:.0f} s with {share}: {now.requests - before.requests}, {failed} failed, {told}")

    def _give_back(self, state: State, new: str, old_serves: bool) -> str:
        """The old version gets the traffic and the consumer group again, the new one ends. Says what serves now. Raises nothing."""
        old = state.active
        try:
            if old_serves:
                self._proxy.set_weight(old, 100)
                self._proxy.set_state(old, READY)
                self._wait(lambda: self._proxy.stats()[old].up, UP_WITHIN_S, f"{old} is up for the proxy", old)
            self._proxy.set_state(new, DRAIN)
            # One that died has nothing to finish.
            with contextlib.suppress(RolloutError):
                self._drained(new)
            self._proxy.set_state(new, MAINT)
            self._stack.stop([SERVICE_OF[new]])
            if old_serves:
                # One that is still in the group stays in it.
                self._join_group(old)
            write_state(self._settings.home_path, State(active=old, versions=state.versions))
        except (RolloutError, StackError, TimeoutError, OSError) as exc:
            return f"and the old one could not be given everything back ({exc}): fraudgate deploy --status, then fraudgate deploy --settle"
        return f"{old} has all the traffic, {state.versions[old].told()}" if old_serves else "no gateway serves: fraudgate up --all"

    def _retire(self, old: str) -> None:
        self._proxy.set_state(old, MAINT)
        stopped = self._stack.stop([SERVICE_OF[old]])
        if stopped:
            self._step(f"{old} has ended")

    def _check_alive(self, slot: str) -> None:
        name = SERVICE_OF[slot]
        if self._stack.pid(name) is None:
            log = self._stack.log_path(name)
            raise RolloutError(f"{slot} died; the end of {log}:\n{processes.log_tail(log)}")

    def _wait(self, condition: Callable[[], bool], within_s: float, what: str, slot: str) -> None:
        """Raises `RolloutError` when the gateway in `slot` dies, or with `what` when it takes too long; TimeoutError without `what`."""
        end_s = time.monotonic() + within_s
        while not condition():
            self._check_alive(slot)
            if time.monotonic() > end_s:
                if not what:
                    raise TimeoutError
                raise RolloutError(f"not within {within_s:.0f} s: {what}")
            self._nap(POLL_S)

    def _note(self, action: str, before: Version, after: Version, reason: str) -> None:
        """One entry of the audit file, which the gateways forward to the topic `audit`."""
        models, old, new = self._settings.models_path, before.told(), after.told()
        try:
            append_audit(models, action=action, subject=SUBJECT, before=old, after=new, reason=reason[:REASON_CHARS_MAX])
        except (OSError, ValueError) as exc:
            self._step(f"the audit entry could not be written: {exc}")

    def _url(self, slot: str) -> str:
        return f"http://{self._settings.host}:{port_of(self._settings, slot)}"

    @property
    def _proxy_url(self) -> str:
        return self._settings.proxy

    def _step(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._began_s:6.1f} s  {text}")
