"""The address bar carries names and numbers only, and whatever else it holds does no harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saelab.errors import ConfigError
from saelab_explorer.address import DECADES, KINDS, ORDERS, Filters, SteerSettings, feature_query, whole_number


@pytest.mark.parametrize("text", ["", "-1", "1e3", "7.0", " 7", "٣", "²", "0x1", "9" * 30, "12", "../../etc"])
def test_a_feature_that_is_no_number_of_this_run_is_refused(text: str):
    with pytest.raises(ConfigError, match="whole number from 0 to 11"):
        whole_number(text, below=12, what="The feature")


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("11", 11), ("007", 7)])
def test_a_feature_of_this_run_is_read(text: str, number: int):
    assert whole_number(text, below=12, what="The feature") == number


filters = st.builds(
    Filters,
    q=st.text(max_size=50),
    kinds=st.lists(st.sampled_from(KINDS), unique=True).map(lambda chosen: tuple(k for k in KINDS if k in chosen)),
    low=st.sampled_from(DECADES),
    high=st.sampled_from(DECADES),
    sort=st.sampled_from(["", *ORDERS, *(f"-{order}" for order in ORDERS)]),
    page=st.integers(0, 999_999),
)


@given(filters)
def test_filters_come_back_from_their_address(chosen: Filters):
    assert Filters.from_query(chosen.query()) == chosen


def test_filters_at_their_defaults_leave_the_address_short():
    assert Filters().query() == {}


@given(st.dictionaries(st.sampled_from(["q", "kinds", "low", "high", "sort", "page", "strength", "mode"]), st.text()))
def test_any_address_gives_usable_filters_and_settings(query: dict[str, str]):
    chosen, settings = Filters.from_query(query), SteerSettings.from_query(query)
    assert chosen.low in DECADES
    assert chosen.high in DECADES
    assert chosen.page >= 0
    assert chosen.sort.removeprefix("-") in ("", *ORDERS)
    assert -2 <= settings.strength <= 2
    assert settings.mode in ("completion", "chat")


@pytest.mark.parametrize("strength", [-2.0, -0.35, 0.0, 0.6, 2.0])
def test_steering_settings_come_back_from_their_address(strength: float):
    settings = SteerSettings(strength=strength, mode="chat")
    assert SteerSettings.from_query(settings.query()) == settings


def test_a_deep_link_names_the_run_and_the_feature():
    assert feature_query("demo", 12) == {"run": "demo", "feature": "12"}
