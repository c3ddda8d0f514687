"""Every name and signature of LMDeploy 0.18.0 that is relied on: what has to be looked at when it is upgraded."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import logging
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_slo.engine.lmdeploy_options import OWN_KEYS, Device, import_lmdeploy
from lmdeploy_slo.observability.logs import set_up_logs


@pytest.fixture(scope="module", autouse=True)
def _lmdeploy() -> None:
    import_lmdeploy(device=Device.CPU, patched=True)


def find(dotted: str) -> Any:
    """`module:attribute.attribute`."""
    module, _, path = dotted.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


SIGNATURES = {
    "lmdeploy:pipeline": {
        "model_path",
        "backend_config",
        "chat_template_config",
        "log_level",
        "max_log_len",
        "trust_remote_code",
        "speculative_config",
        "allowed_media_domains",
        "kwargs",
    },
    "lmdeploy.pipeline:Pipeline.infer": {
        "self",
        "prompts",
        "gen_config",
        "do_preprocess",
        "adapter_name",
        "use_tqdm",
        "kwargs",
    },
    "lmdeploy.pipeline:Pipeline.stream_infer": {
        "self",
        "prompts",
        "sessions",
        "gen_config",
        "do_preprocess",
        "adapter_name",
        "stream_response",
        "kwargs",
    },
    "lmdeploy.pipeline:Pipeline.chat": {
        "self",
        "prompt",
        "session",
        "gen_config",
        "stream_response",
        "adapter_name",
        "kwargs",
    },
    "lmdeploy.pipeline:Pipeline.session": {"self"},
    "lmdeploy.pipeline:Pipeline.close": {"self"},
    "lmdeploy.serve.core.async_engine:AsyncEngine.generate": {"self", "request", "stream_response"},
    "lmdeploy.serve.core.async_engine:AsyncEngine.start_loop": {"self", "loop", "use_async_api"},
    "lmdeploy.serve.core.async_engine:AsyncEngine.health_probe": {"self", "scheduler_stall_timeout"},
    "lmdeploy.serve.managers.session_manager:Session.async_abort": {"self"},
    "lmdeploy.serve.managers.session_manager:SessionManager.remove": {"self", "session"},
    "lmdeploy.serve.managers.session_manager:RequestHandlePool.get": {"self"},
    "lmdeploy.serve.managers.session_manager:RequestHandlePool.put": {"self", "handle"},
    "lmdeploy.turbomind.turbomind:TurboMind._from_hf": {"self", "model_path", "engine_config", "trust_remote_code"},
    "lmdeploy.turbomind.turbomind:TurboMind.get_schedule_metrics": {"self"},
    "lmdeploy.tokenizer:Tokenizer.encode": {"self", "s", "add_bos", "add_special_tokens", "kwargs"},
    "lmdeploy.tokenizer:Tokenizer.decode": {"self", "t", "offset", "skip_special_tokens"},
    "lmdeploy.model:HFChatTemplate.messages2prompt": {"self", "messages", "kwargs"},
}


@pytest.mark.parametrize("dotted", sorted(SIGNATURES))
def test_signatures(dotted: str) -> None:
    assert set(inspect.signature(find(dotted)).parameters) == SIGNATURES[dotted]


def test_preprocess_takes_token_ids_and_a_session() -> None:
    parameters = inspect.signature(find("lmdeploy.serve.core.async_engine:AsyncEngine.preprocess")).parameters
    assert list(parameters)[:4] == ["self", "messages", "session_id", "gen_config"]
    assert parameters["input_ids"].default is None


FIELDS = {
    "lmdeploy:GenerationConfig": {
        "max_new_tokens",
        "min_new_tokens",
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "random_seed",
        "stop_token_ids",
        "ignore_eos",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "logprobs",
        "output_logits",
        "priority",
    },
    "lmdeploy.serve.core.async_engine:GenOut": {
        "response",
        "token_ids",
        "finish_reason",
        "logprobs",
        "logits",
        "cached_tokens",
        "input_token_len",
        "generate_token_len",
        "req_metrics",
    },
    "lmdeploy.serve.core.async_engine:PreprocessedRequest": {"gen_config", "session", "input_token_len"},
    "lmdeploy.messages:ScheduleMetrics": {"active_seqs", "waiting_seqs", "cache_usage", "scheduler_tick"},
    "lmdeploy.messages:RequestMetrics": {"engine_events", "token_timestamp", "cached_tokens"},
    "lmdeploy.messages:EngineEvent": {"type", "timestamp"},
    "lmdeploy.messages:EngineOutput": {"status", "token_ids", "req_metrics"},
    "lmdeploy:TurbomindEngineConfig": {"tp", "dp", "devices", "quant_policy", "enable_prefix_caching", *OWN_KEYS},
}


@pytest.mark.parametrize("dotted", sorted(FIELDS))
def test_fields(dotted: str) -> None:
    names = {field.name for field in dataclasses.fields(find(dotted))}
    assert FIELDS[dotted] <= names


def test_errors_by_code() -> None:
    codes = find("lmdeploy.serve.core.exceptions:ErrorCode")
    assert {code.value for code in codes} == {
        "invalid_request",
        "unauthorized",
        "model_not_found",
        "request_conflict",
        "context_length_exceeded",
        "unsupported_feature",
        "preprocess_failed",
        "request_cancelled",
        "engine_unavailable",
        "internal_error",
    }
    error = find("lmdeploy.serve.core.exceptions:RequestError")(codes.INTERNAL_ERROR)
    assert error.code is codes.INTERNAL_ERROR
    assert error.message


def test_what_hangs_on_a_running_engine(tiny_model: Path) -> None:
    from lmdeploy_slo.core.snapshot import EngineLimits
    from lmdeploy_slo.engine.lmdeploy_options import LmdeployOptions, turbomind_config

    options = LmdeployOptions(str(tiny_model), limits=EngineLimits(max_batch_size=2))
    pipeline = find("lmdeploy:pipeline")(str(tiny_model), backend_config=turbomind_config(options))
    engine = pipeline.async_engine
    assert engine.backend == "turbomind"
    for dotted in (
        "tokenizer.model.model.all_special_ids",
        "chat_template.messages2prompt",
        "hf_cfg.get_text_config",
        "session_len",
        "stop_words",
        "engine.get_schedule_metrics",
        "backend_config.cache_max_entry_count",
        "backend_config.cache_block_seq_len",
        "session_mgr.sessions",
        "session_mgr.request_handle_pool.num_dispatched",
        "prompt_processor.get_prompt_input",
    ):
        found = engine
        for name in dotted.split("."):
            found = getattr(found, name)
    session = pipeline.session()
    assert (session._handle, session._remove_on_request_exit, session.gen_config) == (None, False, None)
    assert session._session_mgr() is pipeline.session_mgr
    assert pipeline.session_mgr.request_handle_pool.pool is None
    pipeline.close()


def test_lmdeploy_itself_has_no_sleep_in_its_native_module() -> None:
    """TurboMind.sleep exists in Python and would fail: nothing here may call it."""
    native = find("lmdeploy.turbomind.turbomind:_tm")
    assert not hasattr(native.TurboMind, "sleep")


def test_our_log_goes_on_whatever_lmdeploy_does_to_handlers() -> None:
    from lmdeploy.utils import get_logger

    root, ours = logging.getLogger(), logging.getLogger("lmdeploy_slo")
    before = root.handlers[:], root.level, ours.level
    stream = io.StringIO()
    try:
        set_up_logs(stream=stream)
        get_logger("lmdeploy_slo_test_of_handlers")
        ours.info("still here")
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        ours.setLevel(before[2])
    assert "still here" in stream.getvalue()
