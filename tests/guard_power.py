"""How soon the guard takes a bad challenger out, and how often a good one, by simulation with the guard's own evidence.

`python -m tests.guard_power` prints the tables of docs/models.md; tests/unit/gateway/models/test_guard.py holds them to the promise. A run
is a stream of cards; of each the guard learns what either model came to. Looked at each `LOOK` payments, as the gateway does each second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.models.guard import BOTH, CHALLENGER_ONLY, CHAMPION_ONLY, CUTS, THINGS, Evidence

LOOK = 20
MERCHANTS = 50
# A score model of payments like the simulator's: most score next to nothing, some a little, frauds a lot. Log-odds.
WEIGHTS, MEANS, SPREADS = (0.975, 0.018, 0.007), (-6.5, -1.5, 2.5), (1.2, 1.5, 1.0)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def draw_log_odds(rng: np.random.Generator, n: int) -> Floats:
    kind = rng.choice(3, n, p=WEIGHTS)
    return rng.normal(np.array(MEANS)[kind], np.array(SPREADS)[kind])


def score_of(log_odds: Floats) -> Floats:
    return np.floor(1000 / (1 + np.exp(-log_odds)) + 0.5)


@dataclass
class World:
    """`cut` is the score from which a payment is declined; `shift` is added to the challenger's log-odds, `noise` to both models' own,
    which makes them two models of the same quality; `extra` is the chance that the challenger declines what the champion doesn't,
    whatever its score.
    """

    cut: float
    shift: float = 0.0
    noise: float = 0.0
    extra: float = 0.0

    def rates(self, n: int = 1_000_000) -> tuple[float, float]:
        """The share of payments that champion and challenger decline."""
        champion, challenger = self.draw(np.random.default_rng(0), n)
        return float(champion[0].mean()), float(challenger[0].mean())

    def draw(self, rng: np.random.Generator, n: int) -> tuple[tuple[Bools, Floats], ...]:
        """Declined and score, (n,), of champion and challenger."""
        base = draw_log_odds(rng, n)
        ours, theirs = (score_of(base + shift + rng.normal(0, 1, n) * self.noise) for shift in (0.0, self.shift))
        return (ours >= self.cut, ours), ((theirs >= self.cut) | (rng.random(n) < self.extra), theirs)


def run(world: World, rng: np.random.Generator, events: int, look: int = LOOK) -> int | None:
    """After how many payments the guard is alarmed, None when it never is."""
    (declined, ours), (they_declined, theirs) = world.draw(rng, events)
    merchant = np.minimum((rng.pareto(1.0, events) * 3).astype(int), MERCHANTS - 1)
    cuts = np.array(CUTS)
    champion, challenger = (
        np.column_stack([declined, ours[:, None] >= cuts]),
        np.column_stack([they_declined, theirs[:, None] >= cuts]),
    )
    return first_alarm(challenger, champion, look, merchant)


def first_alarm(challenger: Bools, champion: Bools, look: int = LOOK, merchant: npt.NDArray[np.int64] | None = None) -> int | None:
    """The same of what either did, (payments, things) each, and the payments' merchants."""
    evidence, events = Evidence(), len(champion)
    how = np.where(challenger & champion, BOTH, np.where(challenger, CHALLENGER_ONLY, CHAMPION_ONLY))
    either = challenger | champion
    row, thing = np.nonzero(either)
    looks = -(-events // look)
    counted = np.bincount((row // look * THINGS + thing) * 3 + how[row, thing], minlength=looks * THINGS * 3)
    for i, counts in enumerate(counted.reshape(looks, THINGS, 3)):
        if not counts.any():
            continue
        evidence.counts += counts
        if merchant is not None:
            for place in (i * look + np.flatnonzero(either[i * look : (i + 1) * look, 0])).tolist():
                evidence.add_merchant(f"m{merchant[place]}", int(how[place, 0]))
        if evidence.alarm() is not None:
            return min((i + 1) * look, events)
    return None


def found_at(world: World, runs: int, events: int, seed: int, look: int = LOOK) -> list[int | None]:
    return [run(world, np.random.default_rng([seed, i]), events, look) for i in range(runs)]


def doubling_shift(cut: float) -> float:
    """What added to the log-odds doubles the declines."""
    base = np.sort(draw_log_odds(np.random.default_rng(1), 2_000_000))
    at = np.log(cut / (1000 - cut))
    declined = float((base >= at).mean())
    return float(at - base[int(len(base) * (1 - 2 * declined))])


def main() -> None:
    print("a challenger with doubled declines: after how many payments it is out, 1,000 runs each, looked at for 4,000 payments")
    print(f"{'declines':<20}{'how':<34}{'5 %':>6}{'half':>6}{'95 %':>6}{'99 %':>6}{'within 2,000':>14}")
    for cut in (900, 800, 600, 400, 200, 100):
        rate, _ = World(cut).rates()
        shifted = World(cut, shift=doubling_shift(cut))
        for how, world in (
            ("every score a little higher", shifted),
            ("declines alone, scores alike", World(cut, extra=rate / (1 - rate))),
        ):
            before, after = world.rates()
            at = np.array([np.inf if n is None else n for n in found_at(world, 1000, 4000, 7)])
            quantiles = "".join(f"{q:>6.0f}" for q in np.quantile(at, (0.05, 0.5, 0.95, 0.99), method="higher"))
            print(f"{before:.2%} -> {after:.2%}".ljust(20) + how.ljust(34) + quantiles + f"{(at <= 2000).mean():>13.1%}")
    print("\ntwo equal models: how many of 2,000 runs of 20,000 payments trip it")
    for noise in (0.0, 0.3, 1.0):
        world = World(800, noise=noise)
        tripped = sum(n is not None for n in found_at(world, 2000, 20_000, 11, look=500))
        print(f"models' own noise {noise:.1f} in log-odds: {tripped} of 2000")


if __name__ == "__main__":
    main()
