"""The configuration: three sources in order, nothing unknown, every value in range, and it can be printed and read."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import lmdeploy_slo
from lmdeploy_slo.config import Config, EngineKind, load, traces_dir
from lmdeploy_slo.core.clients import ClientPolicy
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.toml"


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **{"environ": {}, **kwargs})
    return str(caught.value)


def test_defaults() -> None:
    config = load(environ={})
    assert config.engine.limits == EngineLimits(max_batch_size=256, max_prefill_tokens=8192, kv_tokens=None)
    assert config.engine.effective_kind is EngineKind.EMULATED
    assert config.engine.max_session_tokens is None
    assert config.scheduler.policy == "annealing"
    assert config.scheduler.plan_budget_ms == 2.0
    assert config.scheduler.max_queued_requests is None
    assert config.scheduler.queue_timeout_ms is None
    assert config.tasks == {}


def test_file_then_environment_then_flags(file: Path) -> None:
    file.write_text('[engine]\nmax_batch_size = 1\nmax_prefill_tokens = 1\nkv_tokens = 1\nprofile = "file"')
    environ = {"LMDEPLOY_SLO_ENGINE_MAX_PREFILL_TOKENS": "2", "LMDEPLOY_SLO_ENGINE_KV_TOKENS": "2"}
    flags = {"engine.kv_tokens": 3, "engine.profile": None}
    engine = load(file, environ=environ, flags=flags).engine
    assert (engine.max_batch_size, engine.max_prefill_tokens, engine.kv_tokens) == (1, 2, 3)
    assert engine.profile == "file"


def test_the_environment_can_name_the_file_and_a_flag_overrules_it(file: Path, tmp_path: Path) -> None:
    file.write_text("[server]\nport = 1")
    other = tmp_path / "other.toml"
    other.write_text("[server]\nport = 2")
    environ = {"LMDEPLOY_SLO_CONFIG": str(file)}
    assert load(environ=environ).server.port == 1
    assert load(other, environ=environ).server.port == 2


def test_none_in_the_environment_unsets(file: Path) -> None:
    file.write_text("[engine]\nkv_tokens = 1000")
    assert load(file, environ={"LMDEPLOY_SLO_ENGINE_KV_TOKENS": "none"}).engine.kv_tokens is None


def test_tasks_from_file_and_environment(file: Path) -> None:
    file.write_text("[tasks.chat]\nttft_ms = 1000\ntpot_ms = 50")
    environ = {"LMDEPLOY_SLO_TASKS_CODE_COMPLETION_E2E_MS": "2000", "LMDEPLOY_SLO_TASKS_CHAT_TPOT_MS": "40"}
    tasks = load(file, environ=environ).tasks
    assert tasks["chat"].slo == Slo(ttft_s=1.0, tpot_s=0.04)
    assert tasks["code_completion"].slo == Slo(e2e_s=2.0)


def test_fields_of_turbomind_from_all_sources(file: Path) -> None:
    file.write_text("[engine.turbomind]\ntp = 1\nquant_policy = 8\ndevices = [0]")
    environ = {"LMDEPLOY_SLO_ENGINE_TURBOMIND_TP": "2", "LMDEPLOY_SLO_ENGINE_TURBOMIND_DEVICES": "[0, 1]"}
    flags = {"engine.model": "m", "engine.turbomind.tp": 4, "engine.turbomind.dtype": "bfloat16"}
    turbomind = load(file, environ=environ, flags=flags).engine.turbomind
    assert turbomind == {"tp": 4, "quant_policy": 8, "devices": [0, 1], "dtype": "bfloat16"}


def test_the_last_source_of_a_wrong_value_is_named(file: Path) -> None:
    file.write_text("[tasks.chat]\nttft_ms = 1000")
    text = refusal(file, environ={"LMDEPLOY_SLO_TASKS_CHAT_TTFT_MS": "soon"})
    assert text.startswith("environment variable LMDEPLOY_SLO_TASKS_CHAT_TTFT_MS: tasks.chat.ttft_ms = 'soon'")


def test_a_model_asks_for_lmdeploy() -> None:
    assert load(environ={}, flags={"engine.model": "some/model"}).engine.effective_kind is EngineKind.LMDEPLOY


def test_the_file_may_leave_the_model_to_a_flag(file: Path) -> None:
    file.write_text('[engine]\nkind = "lmdeploy"')
    assert load(file, environ={}, flags={"engine.model": "some/model"}).engine.kind is EngineKind.LMDEPLOY
    assert refusal(file) == "the engine lmdeploy needs a model"


def test_the_emulated_engine_stands_in_for_no_model() -> None:
    text = refusal(flags={"engine.model": "some/model", "engine.kind": "emulated"})
    assert "the emulated engine takes no model: leave 'some/model' out" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device", "cuda"),
        ("patched", False),
        ("look_ahead", 0),
        ("chat_template", "llama2"),
        ("trust_remote_code", True),
        ("turbomind.tp", 2),
    ],
)
def test_what_lmdeploy_alone_reads_is_not_ignored_by_the_emulated_engine(key: str, value: object) -> None:
    text = refusal(flags={f"engine.{key}": value})
    assert text == f"the emulated engine has no {key.partition('.')[0]}: leave it out, or name a model"
    assert load(environ={}, flags={f"engine.{key}": value, "engine.model": "some/model"}).engine.set_for_lmdeploy


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[engine]\nmax_batchsize = 3", "engine.max_batchsize is unknown; did you mean max_batch_size?"),
        ("[engines]\nkind = 'emulated'", "engines is unknown; did you mean engine?"),
        (
            "port = 3",
            "port is unknown (known: server, engine, scheduler, autoscale, stream, limits, security, observability, "
            "tasks)",
        ),
        ("[tasks.chat]\nttft = 3", "tasks.chat.ttft is unknown; did you mean ttft_ms?"),
        ("[tasks.chat]", "tasks.chat = {}: at least one of ttft_ms, tpot_ms and e2e_ms is needed"),
        ("[tasks.chat]\nttft_ms = 0", "tasks.chat.ttft_ms = 0: input should be greater than 0"),
        ("[tasks.chat]\nttft_ms = inf", "tasks.chat.ttft_ms = inf: input should be"),
        ("tasks = 3", "tasks = 3: input should be a valid dictionary"),
        ("[engine]\nmax_batch_size = 0", "engine.max_batch_size = 0: input should be greater than or equal to 1"),
        ("[engine]\nmax_batch_size = '8'", "engine.max_batch_size = '8': input should be a valid integer"),
        ("[engine]\nmax_batch_size = true", "engine.max_batch_size = True: input should be a valid integer"),
        ("[engine]\ndevice = 'tpu'", "engine.device = 'tpu': input should be 'auto' or 'cuda' or 'cpu'"),
        ("[engine]\nkind = 'turbomind'", "engine.kind = 'turbomind': input should be 'emulated' or 'lmdeploy'"),
        ("[server]\nport = 70000", "server.port = 70000: input should be less than or equal to 65535"),
        ("[server", "not TOML"),
    ],
)
def test_what_is_wrong_in_the_file(file: Path, toml: str, expected: str) -> None:
    file.write_text(toml)
    text = refusal(file)
    assert text.startswith(f"{file}: ")
    assert expected in text


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LMDEPLOY_SLO_ENGINE_KV_TOKEN", "1", "is unknown; did you mean LMDEPLOY_SLO_ENGINE_KV_TOKENS?"),
        ("LMDEPLOY_SLO_TASKS_CHAT", "1", "is unknown"),
        ("LMDEPLOY_SLO_ENGINE_KV_TOKENS", "many", "engine.kv_tokens = 'many': input should be a valid integer"),
        ("LMDEPLOY_SLO_TASKS_CHAT_TTFT_MS", "-1", "tasks.chat.ttft_ms = '-1': input should be greater than 0"),
    ],
)
def test_what_is_wrong_in_the_environment(variable: str, value: str, expected: str) -> None:
    text = refusal(environ={variable: value})
    assert text.startswith(f"environment variable {variable}")
    assert expected in text


TLS = {"security.tls_cert": "c.pem", "security.tls_key": "k.pem"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gateway.example"])
@pytest.mark.parametrize(
    ("flags", "needs"),
    [
        ({}, "tls_cert with tls_key, and tokens_file or tls_client_ca"),
        (TLS, "tokens_file or tls_client_ca"),
        ({"security.tokens_file": "tokens"}, "tls_cert with tls_key"),
        ({**TLS, "security.tokens_file": "tokens"}, None),
        ({**TLS, "security.tls_client_ca": "ca.pem"}, None),
        ({"security.insecure": True}, None),
    ],
)
def test_where_others_can_reach_it_strangers_are_kept_out(
    host: str, flags: dict[str, object], needs: str | None
) -> None:
    flags = {"server.host": host, **flags}
    if needs is None:
        assert load(environ={}, flags=flags).server.host == host
    else:
        assert refusal(flags=flags) == f"others can reach {host}: [security] needs {needs}, or insecure (--insecure)"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_on_loopback_all_of_it_may_be_left_out(host: str) -> None:
    assert load(environ={}, flags={"server.host": host}).security.tls_cert is None


def test_certificate_and_key_come_together(file: Path) -> None:
    file.write_text('[security]\ntls_cert = "c.pem"')
    assert "tls_cert and tls_key are set together or not at all" in refusal(file)
    text = refusal(flags={"security.tls_client_ca": "ca.pem"})
    assert "tls_client_ca needs tls_cert and tls_key" in text


def test_limits_of_each_client(file: Path) -> None:
    file.write_text("[limits]\nclient_max_streams = 3\nclient_tokens_per_s = 100")
    policy = load(file, environ={"LMDEPLOY_SLO_LIMITS_CLIENT_BURST_TOKENS": "7"}).limits.client_policy
    assert policy == ClientPolicy(max_streams=3, tokens_per_s=100.0, burst_tokens=7.0)


def test_what_is_wrong_in_a_flag() -> None:
    assert refusal(flags={"engine.kind": "vllm"}).startswith("--engine: engine.kind = 'vllm'")
    assert refusal(flags={"scheduler.plan_budget_ms": 0.0}).startswith("--plan-budget-ms: scheduler.plan_budget_ms")


def test_variables_that_kubernetes_sets_for_a_service_of_our_name_are_ignored() -> None:
    environ = {
        "LMDEPLOY_SLO_SERVICE_HOST": "10.0.0.1",
        "LMDEPLOY_SLO_SERVICE_PORT_GRPC": "50051",
        "LMDEPLOY_SLO_PORT": "tcp://10.0.0.1:50051",
        "LMDEPLOY_SLO_PORT_50051_TCP_ADDR": "10.0.0.1",
    }
    assert load(environ=environ) == Config()


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "not TOML" in refusal(tmp_path / "binary.toml")


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().server.port = 1


def test_traces_dir() -> None:
    assert traces_dir({}) is None
    assert traces_dir({"LMDEPLOY_SLO_TRACES": "/traces"}) == Path("/traces")
    assert load(environ={"LMDEPLOY_SLO_TRACES": "/traces"}) == Config()


durations_ms = st.floats(min_value=0.001, max_value=86_400_000.0)
names = st.text(min_size=1, max_size=64).filter(lambda text: text.isprintable())
tasks = st.dictionaries(
    st.sampled_from(["ttft_ms", "tpot_ms", "e2e_ms"]), durations_ms, min_size=1, max_size=3
)  # what one task holds
of_any_engine = {"profile": names, "kv_tokens": st.integers(1, 2**40)}
loopback = st.sampled_from(["127.0.0.1", "127.1.2.3", "::1", "localhost"])
turbomind_fields = st.dictionaries(names, st.integers(0, 9) | st.booleans() | names, max_size=3)
documents = st.fixed_dictionaries(
    {},
    optional={
        "server": st.fixed_dictionaries({}, optional={"host": loopback, "port": st.integers(0, 65535)}),
        "engine": st.fixed_dictionaries({}, optional=of_any_engine)
        | st.fixed_dictionaries({"model": names}, optional={**of_any_engine, "turbomind": turbomind_fields}),
        "scheduler": st.fixed_dictionaries(
            {}, optional={"seed": st.integers(0, 2**63 - 1), "queue_timeout_ms": durations_ms, "policy": names}
        ),
        "limits": st.fixed_dictionaries(
            {}, optional={"max_streams": st.integers(1, 99), "client_tokens_per_s": st.floats(0.1, 1e6)}
        ),
        "security": st.fixed_dictionaries({}, optional={"tokens_file": names, "insecure": st.booleans()}),
        "stream": st.fixed_dictionaries({}, optional={"flush_interval_ms": st.floats(0, 1000)}),
        "tasks": st.dictionaries(names, tasks, max_size=3),
    },
)


@given(documents)
def test_what_is_printed_reads_back(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> None:
    config = Config.model_validate(document)
    file = tmp_path_factory.mktemp("printed") / "printed.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    again = load(file, environ={})
    assert again.to_toml() == config.to_toml()
    assert again.engine.effective_kind is config.engine.effective_kind
    assert again.model_dump(exclude={"engine": {"kind"}}) == config.model_dump(exclude={"engine": {"kind"}})


def test_what_is_not_set_is_named() -> None:
    header = Config().to_toml().splitlines()[0]
    assert header.startswith("# not set: ")
    assert "engine.kv_tokens" in header
    assert "engine.kind" not in header


def test_no_other_module_reads_the_environment() -> None:
    readers = []
    for path in Path(lmdeploy_slo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
                readers.append(path.name)
    assert set(readers) <= {"config.py", "ray_replica.py"}  # the latter sets what Ray and its processes read


# -- replicas on Ray ----------------------------------------------------------


def test_replicas_take_resources_and_profiles_from_any_source(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("[engine]\nreplicas = 3\nreplica_profiles = ['a', 'b']\nreplica_resources = {GPU = 2, CPU = 0.5}\n")
    from_file = load(file, environ={}).engine
    from_flags = load(
        environ={"LMDEPLOY_SLO_ENGINE_REPLICAS": "3", "LMDEPLOY_SLO_ENGINE_REPLICA_PROFILES": "a,b"},
        flags={"engine.replica_resources": "GPU=2, CPU=0.5"},
    ).engine
    assert from_file == from_flags
    assert from_file.replica_resources == {"GPU": 2.0, "CPU": 0.5}
    assert [from_file.profile_of(number) for number in range(3)] == ["a", "b", "a"]
    assert load(file, environ={}).to_toml().count("replica_profiles") == 1


def test_ray_is_for_several_replicas_or_a_named_cluster() -> None:
    assert not load(environ={}).engine.on_ray
    assert load(environ={}, flags={"engine.replicas": 2}).engine.on_ray
    assert load(environ={}, flags={"engine.ray_address": "auto"}).engine.on_ray


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"engine.replicas": 2, "engine.replica_resources": "GPU"}, "pairs NAME=AMOUNT"),
        ({"engine.replicas": 2, "engine.replica_resources": "GPU=1.5"}, "amount of GPU"),
        ({"engine.replicas": 2, "engine.replica_resources": "GPU=-1"}, "amount of GPU"),
        ({"engine.replica_resources": "GPU=1"}, "set replicas or ray_address"),
        ({"engine.replicas": 2, "engine.model": "m", "server.http_port": 0}, "http_port"),
        ({"engine.replicas": 2, "engine.model": "m", "engine.turbomind.devices": [0]}, "Ray gives each replica"),
        ({"engine.replicas": 0}, "greater than or equal to 1"),
    ],
)
def test_replicas_that_cannot_be_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(environ={}, flags=flags)
