"""The simulated prefix cache, and what a hit saves."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.simulation.prefix_cache import PrefixCache
from lmdeploy_slo.offline.simulator import SimulatedRequest, Simulator
from lmdeploy_slo.scheduling.policy import make_policy
from lmdeploy_slo.testing.builders import A100, make_spec


def test_a_hit_is_an_unbroken_run_from_the_start() -> None:
    cache = PrefixCache(10 * 512)
    cache.insert([1, 2, 3])
    assert cache.match([1, 2, 9, 3], 4 * 512) == 2 * 512
    assert cache.match([9, 1], 2 * 512) == 0
    assert (cache.hit_tokens, cache.looked_up_tokens) == (2 * 512, 6 * 512)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    cache = PrefixCache(10 * 512)
    cache.insert([1, 2])
    assert cache.match([1, 2], 2 * 512) == 2 * 512 - 1
    assert cache.match([1, 2], 700) == 699  # a last block that is not full


def test_the_least_recently_used_goes_first_and_the_start_of_a_prompt_last() -> None:
    cache = PrefixCache(4 * 512)
    cache.insert([1, 2])
    cache.insert([3, 4])
    cache.match([1, 2], 2 * 512)
    cache.insert([5])
    assert cache.match([3, 4], 1024) == 512  # 4 went, 3 is the start of its prompt
    cache.insert([6, 7])
    assert cache.match([1, 2], 1024) == 0  # used before 5, 3, 6 and 7 were
    assert len(cache) == 4


@given(st.integers(0, 5), st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), unique=True, max_size=7))))
def test_equals_a_plain_model(capacity: int, script: list[tuple[bool, list[int]]]) -> None:
    cache, plain = PrefixCache(capacity * 512 + 100), OrderedDict[int, None]()
    for insert, blocks in script:
        if insert:
            cache.insert(blocks)
            for block in blocks[:capacity][::-1]:
                plain.pop(block, None)
                plain[block] = None
            while len(plain) > capacity:
                plain.popitem(last=False)
        else:
            hits = 0
            while hits < len(blocks) and blocks[hits] in plain:
                plain.move_to_end(blocks[hits])
                hits += 1
            assert cache.match(blocks, 512 * len(blocks) + 1) == 512 * hits
        assert list(cache._blocks) == list(plain)
        assert len(cache) <= capacity


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity_tokens"):
        PrefixCache(-1)


def test_the_simulated_engine_computes_only_what_is_not_cached() -> None:
    def first_tokens(cache_tokens: int | None) -> list[float | None]:
        requests = [
            SimulatedRequest(
                make_spec(str(n), arrival_at_s=10.0 * n, prompt_tokens=1100), 2, prefix_blocks=(1, 2, 100 + n)
            )
            for n in range(3)
        ]
        simulator = Simulator(
            make_policy("fcfs"), model=A100, limits=EngineLimits(), prefix_cache_tokens=cache_tokens, plan_latency_s=0.0
        )
        return [record.timing.ttft_s for record in simulator.run(requests)]

    whole = A100.step_s(1100, 1100**2, 0, 0)
    rest = A100.step_s(76, 76 * (76 + 2 * 1024), 0, 0)
    assert first_tokens(None) == pytest.approx([whole] * 3)
    assert first_tokens(4 * 512) == pytest.approx([whole, rest, rest])
    with_one_block = A100.step_s(588, 588 * (588 + 1024), 0, 0)
    assert first_tokens(512) == pytest.approx([whole, with_one_block, with_one_block])
