"""What a simulation is made from. Everything it produces is a function of these values alone."""

from __future__ import annotations

from dataclasses import dataclass, field

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
# Monday, 2026-01-05T00:00:00Z.
START_MS_DEFAULT = 1_767_571_200_000

SEED_MAX = 2**32 - 1
CARDS_MIN = 200
CARDS_MAX = 2_000_000
EVENTS_PER_DAY_MIN = 100
EVENTS_PER_DAY_MAX = 100_000_000
FRAUD_RATE_MAX = 0.2

# Shares of the fraudulent transactions, by pattern. They add up to 1.
SHARES_DEFAULT: dict[str, float] = {
    "card_testing": 0.25,
    "compromised_merchant": 0.25,
    "account_takeover": 0.15,
    "amount_inflation": 0.20,
    "bin_attack": 0.15,
}


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """`events_per_day` is the mean number of genuine transactions a simulated day; `fraud_rate` the share of fraud among all.

    `shares` says how the fraud is divided between the patterns; one left out does not happen. Raises ValueError outside bounds.
    """

    seed: int = 7
    cards: int = 5_000
    start_ms: int = START_MS_DEFAULT
    events_per_day: int = 10_000
    fraud_rate: float = 0.015
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES_DEFAULT))

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("seed", self.seed, 0, SEED_MAX),
            ("cards", self.cards, CARDS_MIN, CARDS_MAX),
            ("events_per_day", self.events_per_day, EVENTS_PER_DAY_MIN, EVENTS_PER_DAY_MAX),
            ("fraud_rate", self.fraud_rate, 0.0, FRAUD_RATE_MAX),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in {least}..{most}")
        unknown = set(self.shares) - set(SHARES_DEFAULT)
        if unknown:
            raise ValueError(f"no fraud pattern is named {', '.join(sorted(unknown))}")
        if self.shares and abs(sum(self.shares.values()) - 1.0) > 1e-9:
            raise ValueError("the shares of the fraud patterns must add up to 1")

    @property
    def slice_ms(self) -> int:
        """Simulated time that is generated at once: an hour, or less where an hour would hold more than some 8,000 events."""
        return max(60_000, min(HOUR_MS, 8_000 * DAY_MS // self.events_per_day // 60_000 * 60_000))


assert abs(sum(SHARES_DEFAULT.values()) - 1.0) < 1e-9
