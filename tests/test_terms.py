"""What a request promises: from headers, bodies and arguments, every wrong field named."""

from __future__ import annotations

from typing import Any

import pytest

from lmdeploy_slo.core.slo import NO_SLO, Slo
from lmdeploy_slo.errors import InvalidRequest
from lmdeploy_slo.frontend.terms import NO_TERMS, Terms, slo_of, terms_of_http


def fields(caught: pytest.ExceptionInfo[InvalidRequest]) -> list[str]:
    return [violation.field for violation in caught.value.violations]


def test_an_slo_comes_as_itself_or_in_milliseconds() -> None:
    slo = Slo(ttft_s=0.5)
    assert slo_of(slo) is slo
    assert slo_of(None) is NO_SLO
    assert slo_of({"ttft_ms": 500, "tpot_ms": 50.0, "e2e_ms": None}) == Slo(ttft_s=0.5, tpot_s=0.05)


@pytest.mark.parametrize("wrong", [0, -1, True, "500", float("nan"), float("inf"), 86_400_001])
def test_an_objective_is_a_positive_number_of_at_most_a_day(wrong: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        slo_of({"ttft_ms": wrong, "ttft": 3})
    assert fields(caught) == ["slo.ttft", "slo.ttft_ms"]


def test_anything_else_is_no_slo() -> None:
    with pytest.raises(InvalidRequest) as caught:
        slo_of(0.5)  # type: ignore[arg-type]
    assert fields(caught) == ["slo"]


def test_http_headers_and_body() -> None:
    assert terms_of_http({}, {}) == NO_TERMS
    headers = {
        "x-llm-d-slo-ttft-ms": "500",
        "x-llm-d-slo-tpot-ms": "50.5",
        "x-slo-e2e-ms": "9000",
        "x-task-type": "chat",
        "x-llm-d-inference-fairness-id": "team",
    }
    assert terms_of_http(headers, {}) == Terms(Slo(0.5, 0.0505, 9.0), "chat", None, "team")
    assert terms_of_http({"x-conversation-id": "c-1"}, {}).conversation_id == "c-1"
    assert terms_of_http({"x-conversation-id": "c-1"}, {"conversation_id": "c-2"}).conversation_id == "c-2"
    body = {"slo": {"ttft_ms": 100}, "task_type": "code", "expected_output_tokens": 40, "max_tokens": 3}
    assert terms_of_http(headers, body) == Terms(Slo(0.1, 0.0505, 9.0), "code", 40, "team")


def test_http_tells_everything_that_is_wrong() -> None:
    headers = {"x-llm-d-slo-ttft-ms": "soon", "x-slo-e2e-ms": "-4", "x-llm-d-inference-fairness-id": "f" * 129}
    with pytest.raises(InvalidRequest) as caught:
        terms_of_http(headers, {"task_type": 5, "expected_output_tokens": 0})
    assert fields(caught) == [
        "x-llm-d-slo-ttft-ms",
        "slo.e2e_ms",
        "task_type",
        "fairness_id",
        "expected_output_tokens",
    ]
    with pytest.raises(InvalidRequest) as caught:
        terms_of_http({}, {"slo": 500})
    assert fields(caught) == ["slo"]
