"""Each feature has a reason code on either side of what is usual, and each code a text for both readers."""

from __future__ import annotations

from pathlib import Path

from gateway.contracts.feature_reasons import FEATURE_REASONS, MODEL_REASONS
from gateway.contracts.features import FEATURE_INDEX, FEATURES
from gateway.contracts.reasons import CARDHOLDER_TEXT, REASON_TEXT, Reason

# Receipts, dashboards and policies name these: a code may be added, none renamed or taken away.
STABLE = """
MODEL_SCORE_HIGH CARD_VELOCITY DEVICE_MANY_CARDS IP_MANY_CARDS MERCHANT_CARD_TESTING AMOUNT_UNUSUAL IMPOSSIBLE_TRAVEL AMOUNT_LIMIT NO_MODEL
AMOUNT_HIGH AMOUNT_SMALL AMOUNT_AS_USUAL UNUSUAL_HOUR PAYMENT_CHANNEL CROSS_BORDER PAYMENT_COUNTRY CARD_MUCH_USED CARD_LITTLE_USED
CARD_USED_JUST_BEFORE CARD_LONG_UNUSED CARD_MANY_MERCHANTS CARD_MANY_COUNTRIES CARD_COUNTRY_CHANGED CARD_MANY_DEVICES CARD_DEVICES
CARD_TRAVEL
SPENDING_HIGH SPENDING_LOW NEW_MERCHANT NEW_DEVICE CUSTOMER_VELOCITY CUSTOMER_LITTLE_HISTORY CUSTOMER_MANY_CARDS CUSTOMER_FRAUD_HISTORY
CUSTOMER_PROFILE MERCHANT_CATEGORY MERCHANT_BUSY MERCHANT_LITTLE_KNOWN MERCHANT_AMOUNT_UNUSUAL MERCHANT_MANY_CARDS MERCHANT_FRAUD_HISTORY
MERCHANT_PROFILE DEVICE_BUSY DEVICE_MANY_ADDRESSES DEVICE_LITTLE_KNOWN DEVICE_UNKNOWN IP_BUSY IP_LITTLE_KNOWN IP_UNKNOWN
""".split()


def test_codes_stay() -> None:
    assert set(STABLE) <= {r.value for r in Reason}


def test_every_feature_has_its_codes() -> None:
    assert len(FEATURE_REASONS) == len(FEATURES)
    assert {r for sides in FEATURE_REASONS for r in sides.reasons} == set(MODEL_REASONS)


def test_a_family_says_what_it_is() -> None:
    def above(name: str) -> Reason:
        return FEATURE_REASONS[FEATURE_INDEX[name]].above

    assert above("card_amount_ratio_30d") is Reason.AMOUNT_UNUSUAL
    assert above("device_distinct_cards_24h") is Reason.DEVICE_MANY_CARDS
    assert above("merchant_fraud_rate_7d") is Reason.MERCHANT_FRAUD_HISTORY
    assert above("card_new_device") is Reason.NEW_DEVICE
    assert FEATURE_REASONS[FEATURE_INDEX["card_count_5m"]].extreme is Reason.CARD_VELOCITY
    assert FEATURE_REASONS[FEATURE_INDEX["card_count_30d"]].extreme is None


def test_a_cardholder_is_told_neither_what_was_counted_nor_that_it_was_fraud() -> None:
    for reason in Reason:
        text = CARDHOLDER_TEXT[reason]
        assert text != REASON_TEXT[reason]
        assert text.endswith(".")
        assert not {"fraud", "risk", "model", "score", "rule"} & set(text.lower().rstrip(".").split())


def test_the_api_page_has_every_code_with_its_texts() -> None:
    page = (Path(__file__).parents[3] / "docs/api.md").read_text()
    for reason in Reason:
        assert f"| `{reason.value}` | {REASON_TEXT[reason]} | {CARDHOLDER_TEXT[reason]} |" in page


def test_several_codes_share_what_a_cardholder_is_told() -> None:
    assert len(set(CARDHOLDER_TEXT.values())) <= len(Reason) // 4
