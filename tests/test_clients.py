"""What a client may claim: moved to the nearest value that is allowed, and told which field that was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.clients import FREE, ClientPolicies, ClientPolicy, clamp
from lmdeploy_slo.core.request import ClientId, PriorityClass
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.testing.builders import make_slo, make_spec

P = PriorityClass


def test_without_a_policy_a_request_stays_as_it_is() -> None:
    spec = make_spec(priority_class=P.SYSTEM, slo=make_slo(ttft_ms=1))
    assert clamp(spec, FREE) == (spec, ())
    assert clamp(spec, ClientPolicy(max_streams=1)) == (spec, ())


@pytest.mark.parametrize(
    ("claimed", "allowed", "given"),
    [
        (P.SYSTEM, {P.BULK, P.INTERACTIVE}, P.INTERACTIVE),
        (P.DEFAULT, {P.BULK, P.INTERACTIVE}, P.BULK),
        (P.BULK, {P.DEFAULT, P.INTERACTIVE}, P.DEFAULT),
        (P.BULK, set(P), P.BULK),
    ],
)
def test_a_class_is_lowered_rather_than_raised(claimed: P, allowed: set[P], given: P) -> None:
    spec, told = clamp(make_spec(priority_class=claimed), ClientPolicy(classes=frozenset(allowed)))
    assert spec.priority_class is given
    assert told == (("priority_class",) if given is not claimed else ())


def test_objectives_are_held_between_the_tightest_and_the_loosest() -> None:
    policy = ClientPolicy(tightest_slo=make_slo(ttft_ms=200, tpot_ms=20), loosest_slo=make_slo(e2e_ms=60_000))
    spec, told = clamp(make_spec(slo=make_slo(ttft_ms=1, tpot_ms=50, e2e_ms=90_000)), policy)
    assert spec.slo == make_slo(ttft_ms=200, tpot_ms=50, e2e_ms=60_000)
    assert told == ("slo.ttft_ms", "slo.e2e_ms")
    assert clamp(make_spec(), policy) == (make_spec(), ())  # what is not claimed is not made up


def test_the_other_claims() -> None:
    policy = ClientPolicy(sheddable=True, max_queue_timeout_s=5.0, length_hints=False)
    spec, told = clamp(make_spec(expected_output_tokens=1), policy)
    assert (spec.sheddable, spec.queue_timeout_s, spec.expected_output_tokens) == (True, 5.0, None)
    assert told == ("sheddable", "queue_timeout_ms", "expected_output_tokens")
    assert clamp(make_spec(sheddable=True, queue_timeout_s=4.0), policy)[1] == ()


durations = st.none() | st.floats(0.001, 1000.0)
slos = st.builds(Slo, durations, durations, durations)


@given(slos, slos, st.sampled_from(P), st.sets(st.sampled_from(P), min_size=1))
def test_clamping_twice_changes_nothing_more(slo: Slo, tightest: Slo, claimed: P, allowed: set[P]) -> None:
    policy = ClientPolicy(classes=frozenset(allowed), tightest_slo=tightest, loosest_slo=tightest.scaled(2))
    once, _ = clamp(make_spec(slo=slo, priority_class=claimed), policy)
    assert clamp(once, policy) == (once, ())
    assert once.priority_class in allowed
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        value, least = getattr(once.slo, name), getattr(tightest, name)
        assert (value is None) == (getattr(slo, name) is None)
        assert value is None or least is None or least <= value <= 2 * least


def test_a_users_policy_is_its_own_or_that_of_who_names_it() -> None:
    proxy, alice, other = ClientPolicy(max_streams=1), ClientPolicy(max_streams=2), ClientPolicy(max_streams=3)
    policies = ClientPolicies(other, {"proxy": proxy, "proxy/alice": alice})
    assert policies.of(ClientId("proxy", "alice")) is alice
    assert policies.of(ClientId("proxy", "bob")) is proxy
    assert policies.of(ClientId("proxy")) is proxy
    assert policies.of(ClientId("", "proxy")) is other
    assert policies.of(ClientId("else")) is other
    assert str(ClientId("proxy", "alice")) == "proxy/alice"
