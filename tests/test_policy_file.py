"""The client policy file: what it says becomes policies, what is wrong in it is told, and it is watched."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.config_sections import LimitsConfig
from lmdeploy_slo.core.clients import ClientPolicy
from lmdeploy_slo.core.request import ClientId, PriorityClass
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.gateway import policy_file
from lmdeploy_slo.gateway.policy_file import read_policies
from lmdeploy_slo.gateway.watched import Watched
from lmdeploy_slo.testing.builders import make_slo


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "clients.toml"


def example() -> str:
    """The one in the module's docstring."""
    lines = (policy_file.__doc__ or "").splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith("    "))


def test_the_example(file: Path) -> None:
    file.write_text(example())
    policies = read_policies(file)
    default = policies.of(ClientId("somebody"))
    assert default == ClientPolicy(
        classes=frozenset({PriorityClass.BULK, PriorityClass.DEFAULT}),
        tightest_slo=make_slo(ttft_ms=200),
        loosest_slo=make_slo(e2e_ms=600_000),
        sheddable=True,
        length_hints=False,
        max_queue_timeout_s=30.0,
        max_streams=64,
        max_queued_requests=200,
        max_queued_tokens=400_000,
        tokens_per_s=2000.0,
        burst_tokens=20_000.0,
    )
    frontend = policies.of(ClientId("chat-frontend"))
    assert frontend.names_users
    assert frontend.operator
    assert PriorityClass.INTERACTIVE in frontend.classes
    assert frontend.tokens_per_s == default.tokens_per_s


def test_every_key_is_in_the_example() -> None:
    for field in ClientPolicy.__dataclass_fields__:
        name = field.removesuffix("_s") + "_ms" if field.endswith("timeout_s") else field
        assert f"\n{name} = " in example(), name


def test_what_the_server_says_holds_where_the_file_says_nothing(file: Path) -> None:
    file.write_text("[default]\nmax_streams = 5\n[clients.a]\nburst_tokens = 1")
    policies = read_policies(file, ClientPolicy(max_streams=1, tokens_per_s=7.0))
    assert policies.of(ClientId("b")) == ClientPolicy(max_streams=5, tokens_per_s=7.0)
    assert policies.of(ClientId("a")) == ClientPolicy(max_streams=5, tokens_per_s=7.0, burst_tokens=1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[default", "not TOML"),
        ("[defaults]", "defaults: Extra inputs are not permitted"),
        ("[default]\nmax_stream = 1", "default.max_stream: Extra inputs"),
        ("[default]\nmax_streams = 0", "default.max_streams: Input should be greater than or equal to 1"),
        ("[default]\nmax_streams = '1'", "default.max_streams: Input should be a valid integer"),
        ("[default]\nclasses = []", "default.classes: List should have at least 1 item"),
        ("[default]\nclasses = ['vip']", "default.classes.0: Input should be 'bulk', 'default'"),
        ("[clients.a]\ntokens_per_s = inf", "clients.a.tokens_per_s: Input should be a finite number"),
        ("[clients.a]\ntightest_slo = { ttft = 1 }", "clients.a.tightest_slo.ttft: Extra inputs"),
        (
            "[default]\ntightest_slo = { tpot_ms = 30 }\n[clients.a]\nloosest_slo = { tpot_ms = 20 }",
            "a: the tightest tpot_ms is above the loosest",
        ),
        ("a = 1\nb = 2", "a: Extra inputs are not permitted; b: Extra"),
    ],
)
def test_what_is_wrong_is_told(file: Path, text: str, expected: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_policies(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert expected in str(caught.value)


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_policies(file)


# -- watched ------------------------------------------------------------------


def test_a_changed_file_is_read_again_within_a_second_of_use(file: Path) -> None:
    clock = VirtualClock()
    file.write_text("[default]\nmax_streams = 1")
    watched = Watched("policies", [file], lambda: read_policies(file), clock)
    file.write_text("[default]\nmax_streams = 22")
    assert watched().default.max_streams == 1
    clock.advance(1.0)
    assert watched().default.max_streams == 22


def test_a_broken_file_leaves_what_was_until_it_is_mended(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = VirtualClock()
    file.write_text("[default]\nmax_streams = 1")
    watched = Watched("policies", [file], lambda: read_policies(file), clock)
    for broken in ("[default]\nmax_streams = -1", ""):
        file.write_text(broken) if broken else file.unlink()
        caplog.clear()
        for _ in range(5):
            clock.advance(1.0)
            assert watched().default.max_streams == 1
        assert [record.levelno for record in caplog.records] == [logging.ERROR], "said once, not every second"
        assert "policies stay as they were" in caplog.text
    file.write_text("[default]\nmax_streams = 3")
    assert watched.reload()
    assert watched().default.max_streams == 3


def test_a_reload_says_whether_it_took(file: Path) -> None:
    file.write_text("")
    watched = Watched("policies", [file], lambda: read_policies(file), VirtualClock())
    file.write_text("[default]\nmax_streams = 3")
    assert watched.reload()
    file.write_text("?")
    assert not watched.reload()
    assert watched().default.max_streams == 3


def test_a_broken_file_is_no_start(file: Path) -> None:
    file.write_text("?")
    with pytest.raises(ConfigError):
        Watched("policies", [file], lambda: read_policies(file), VirtualClock())


# -- what the page says -------------------------------------------------------

LIMITS_PAGE = (Path(__file__).parents[1] / "docs" / "limits.md").read_text(encoding="utf-8")


def test_the_page_on_limits_shows_a_file_that_can_be_read(file: Path) -> None:
    (toml,) = re.findall(r"```toml\n(.*?)```", LIMITS_PAGE, re.DOTALL)
    file.write_text(toml)
    policies = read_policies(file)
    assert policies.of(ClientId("nightly")).sheddable is True
    assert policies.of(ClientId("ops")).operator


def test_the_page_on_limits_names_every_key() -> None:
    keys = [
        *LimitsConfig.model_fields,
        *(field for field in ClientPolicy.__dataclass_fields__ if "timeout" not in field),
    ]
    assert [key for key in keys if f"`{key}`" not in LIMITS_PAGE and f"\n{key} = " not in LIMITS_PAGE] == []
