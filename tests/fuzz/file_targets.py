"""What an operator may feed us: traces, conversations, timelines, tables, profiles, configuration, policies, tokens,
states. Each reader takes a file or says what is wrong with it; what it takes can be worked with.

Files are written to memory where the machine has a folder for that.
"""

from __future__ import annotations

import atexit
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from mutation import NUMBERS, mutated
from outcome import Target, promise

from lmdeploy_slo import config
from lmdeploy_slo.cli import plan
from lmdeploy_slo.core.clients import clamp
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import ClientId
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import ConfigError, TraceError
from lmdeploy_slo.gateway.policy_file import read_policies
from lmdeploy_slo.gateway.tokens import read_tokens
from lmdeploy_slo.offline import sharegpt
from lmdeploy_slo.offline.benchmark_table import read_table
from lmdeploy_slo.offline.profiler.grid import GridLimits
from lmdeploy_slo.offline.profiler.state import ProfilerState, load_state
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.timelines import read_timelines
from lmdeploy_slo.offline.traces import read_traces
from lmdeploy_slo.prediction.calibration import Calibration
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.prediction.observations import Observation
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.prediction.profiles import load_profile, profile_names
from lmdeploy_slo.prediction.state import StateFile
from lmdeploy_slo.testing.builders import make_slo, make_spec


@cache
def _folder() -> Path:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _file(data: bytes, name: str = "input") -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def _reader(read: Callable[[Path], None], refusal: type[Exception], name: str = "input") -> Callable[[bytes], str]:
    def take(data: bytes) -> str:
        path = _file(data, name)
        try:
            read(path)
        except refusal as error:
            promise(0 < len(str(error)) < 20_000, f"a refusal of {len(str(error))} characters")
            return "refused"
        return "read"

    return take


def _finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)


# -- readers and what must hold of what they return -------------------------------------------------------------------


def _traces(path: Path) -> None:
    rows = read_traces([path])
    promise(bool(rows) and rows[0].arrival_s == 0, "no first row")
    promise([r.index for r in rows] == list(range(len(rows))), "indices")
    promise(all(_finite(r.arrival_s) and min(r.input_tokens, r.output_tokens) >= 1 for r in rows), "out of range")
    promise(all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(rows)), "not by arrival")


def _conversations(path: Path) -> None:
    found = sharegpt.read_conversations(path, sharegpt.Turns.ALL)
    turns = [turn for conversation in found for turn in conversation]
    promise(bool(turns) and all(t.prompt_tokens >= 1 and t.output_tokens >= 1 for t in turns), "an empty turn")


def _timelines(path: Path) -> None:
    record = read_timelines(path)
    timelines = record.timelines
    promise(len(timelines) >= 1, "no requests")
    promise(bool((timelines.prompt_tokens >= 1).all()), "a prompt below 1")
    promise(bool((timelines.queued_at_s[1:] >= timelines.queued_at_s[:-1]).all()), "not in order")


def _table(path: Path) -> None:
    table = read_table(path, max_prefill_tokens=8192, kv_tokens=10_000_000)
    promise(all(_finite(o.seconds) and o.seconds > 0 for o in table.observations), "an observation out of range")


def _profile(path: Path) -> None:
    profile = load_profile(str(path))
    step_s = profile.step_model
    promise(_finite(step_s.c0, step_s.p1, step_s.p2, step_s.d1, step_s.d2), "a coefficient is not finite")
    profile.ranged_step_model()
    promise(load_profile(str(_file(profile.text().encode(), "again.json"))) == profile, "it is not what it was")


def _config(path: Path) -> None:
    loaded = config.load(path, environ={})
    again = config.load(_file(loaded.to_toml().encode(), "again.toml"), environ={})
    engine = loaded.engine.model_copy(update={"kind": loaded.engine.effective_kind})
    promise(again == loaded.model_copy(update={"engine": engine}), "written and read again it is another")
    for task in loaded.tasks.values():
        promise(
            all(v is None or v > 0 for v in (task.slo.ttft_s, task.slo.tpot_s, task.slo.e2e_s)), "an objective of 0"
        )


_SPEC = make_spec("r", slo=make_slo(ttft_ms=100, tpot_ms=20, e2e_ms=4000), expected_output_tokens=5)


def _policies(path: Path) -> None:
    policies = read_policies(path)
    for name in ("", "alice", "chat-frontend", "chat-frontend/user"):
        policy = policies.of(ClientId(name))
        spec, changed = clamp(_SPEC, policy)
        promise(bool(changed) == (spec != _SPEC), "what was changed is not told")
        promise(policy.burst >= 1, "a burst below 1")


def _tokens(path: Path) -> None:
    tokens = read_tokens(path)
    for token_id in tokens.by_id:
        promise(tokens.client_of(f"slo_{token_id}_{'x' * 43}") is None, "a token of nobody is taken")


_LIMITS = GridLimits(max_batch_size=8, max_prefill_tokens=512, max_session_tokens=2048)
_TARGET = {"engine": "emulated", "model": "emulated"}


def _profiler_state(path: Path) -> None:
    state = load_state(path, _TARGET, _LIMITS)
    promise(_finite(state.elapsed_s) and all(_finite(o.seconds) for o in state.observations), "not finite")
    promise(json.loads(state.text)["format"] == "1.0", "it cannot be written again")


def _profiler_states() -> list[bytes]:
    observations = [Observation(3, 0.05, prompts=1, prefill_tokens=64.0, prefill_square=4096.0, point="prefill 1 x 64")]
    observations.append(Observation(16, 0.2, batch_size=4.0, context_tokens=900.0, point="decode 4 x 16"))
    state = ProfilerState(_TARGET, _LIMITS, None, 1.5, observations, {"decode 4 x 16": 1}, {"prefill 1 x 2": "late"})
    return [state.text.encode()]


def _plan(path: Path) -> None:
    plan._read(str(path)).problem()


def take_slo_option(data: bytes) -> str:
    options = data.decode("utf-8", "replace").split("\n")
    try:
        slos = parse_slo_options(options)
    except ConfigError:
        return "refused"
    promise(all(slo.has_objective for slo in slos.values()), "an SLO without objectives")
    return "read"


# -- the state file of a server ---------------------------------------------------------------------------------------


def _learners() -> dict[str, object]:
    model = StepModel(0.01, 1e-5, 0.0, 1e-5, 0.0)
    return {
        "step_model": Calibration(model, EngineLimits(), progress=lambda handle: 0, quiet=True),
        "prefix_cache": PrefixPredictor(),
        "output_lengths": TaskLengthPredictor(),
    }


def _state_file(learners: dict[str, object]) -> StateFile:
    return StateFile(_folder() / "state", engine="e", model="m", learners=lambda: learners)  # type: ignore[arg-type]


def take_state(data: bytes) -> str:
    """Never refused: what cannot be used is set aside, and the learners work whatever was in it."""
    learners = _learners()
    file = _state_file(learners)
    file.path.write_bytes(data)
    restored = file.load()
    lengths, calibration = learners["output_lengths"], learners["step_model"]
    assert isinstance(lengths, TaskLengthPredictor)
    assert isinstance(calibration, Calibration)
    forecast = lengths.predict(_SPEC)
    promise(_finite(*forecast.quantiles) and 1 <= forecast.tokens < math.inf, f"a forecast of {forecast}")
    model = calibration.model
    promise(_finite(model.c0, model.p1, model.p2, model.d1, model.d2), f"{model}")
    promise(file.write(file.collect()), "what was read cannot be written")
    return f"{len(restored)} parts"


def _state_examples() -> list[bytes]:
    learners = _learners()
    lengths = learners["output_lengths"]
    assert isinstance(lengths, TaskLengthPredictor)
    for number in range(40):
        lengths.observe(make_spec(f"r{number}", task_type="chat", expected_output_tokens=9 + number), 10 + number)
    file = _state_file(learners)
    file.write(file.collect())
    return [file.path.read_bytes()]


# -- examples ---------------------------------------------------------------------------------------------------------

_TRACES = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16T18:17:04+01:00,3180,8\n",
    b"arrival_s,input_tokens,output_tokens,task_class\n5,374,44,chat\n4.5,396,109,code\n",
    b'{"timestamp": 1000, "input_length": 40, "output_length": 6, "hash_ids": [0, 1]}\n'
    b'{"timestamp": 1027, "input_length": 30, "output_length": 4}\n',
    b'arrival_s,input_tokens,output_tokens\n"1","2",3\n\n2,3,4\n',
)
_CONVERSATIONS = (
    json.dumps(
        [{"conversations": [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "answer " * 9}] * 2}]
    ).encode(),
    b'{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}\n' * 2,
)
_TIMELINES = (
    b"arrival_s,queued_ts,scheduled_ts,first_token_ts,last_token_ts,input_toks,output_toks\n0,1,2,3,4,50,6\n1,2,3,4,,7,\n",
    b'{"queued": 1.5, "first_token": 2.5, "prompt_tokens": 7, "last_token": 9, "output_tokens": 3}\n' * 2,
)
_TABLES = (
    b"batch,prompt_tokens,output_tokens,tok_p50_s,ftl_ave_s\n1,128,64,0.01,0.05\n8,2048,512,0.02,0.3\n",
    b"batch_size,prompt_len,output_len,50%(s)\n1,1,128,0.0097\n",
)
_CONFIGS = (
    b'[server]\nhost = "127.0.0.1"\nport = 1\ndrain_grace_s = 5.0\n[engine]\nprofile = "h200-qwen2.5-7b"\n'
    b'max_batch_size = 64\n[scheduler]\npolicy = "edf"\nqueue_timeout_ms = 5000\n[limits]\nmax_streams = 9\n'
    b"queue_share = 0.5\n[observability]\nmetrics_port = 9000\nlog_requests = true\n"
    b"[tasks.chat]\nttft_ms = 1000\ntpot_ms = 50.5\n[tasks.code]\ne2e_ms = 30_000\n",
    b'[engine]\nmodel = "m"\nkind = "lmdeploy"\n[engine.turbomind]\ntp = 2\ncache_max_entry_count = 0.5\n',
)
_POLICIES = (
    b'[default]\nclasses = ["bulk", "default"]\ntightest_slo = { ttft_ms = 200 }\nloosest_slo = { e2e_ms = 600_000 }\n'
    b"sheddable = true\nlength_hints = false\nmax_queue_timeout_ms = 30_000\nmax_streams = 64\ntokens_per_s = 2000\n"
    b'[clients.chat-frontend]\nclasses = ["interactive"]\nnames_users = true\nburst_tokens = 20_000\n[clients.alice]\n',
)
_TOKENS = (
    b"# tokens\nalice abcdefghij sha256:" + b"0a" * 32 + b"   # laptop\nbob 234567abcd sha256:" + b"ff" * 32 + b"\n\n",
)
_PROFILES = (
    *(Path(config.__file__).parent.joinpath(f"prediction/profiles/{n}.json").read_bytes() for n in profile_names()[:2]),
    b'{"format": 1, "name": "own", "step_ms": {"c0": 4.3, "p1": 0.017, "p2": 5e-7, "d1": 0.007, "d2": 1.3e-5}}',
    b'{"format": "2.3", "name": "n", "new": [1], "step_ms": {"c0": 1, "p1": 1, "p2": 0, "d1": 1, "d2": 0},'
    b'"bilinear_ms": {"prefill": [1, 2, 3, 4], "decode": [0, 0.1, 0, 9]}, "range": {"batch_size": [1, 64]}}',
)
_PLANS = (
    json.dumps(
        {
            "max_batch_size": 2,
            "latency": {"prefill": [0.1, 5.7, 0.01, 43.67], "decode": [0.0002, 0.275, 0.00088, 15.85]},
            "requests": [
                {"id": "a", "prompt_tokens": 100, "output_tokens": 50, "slo": {"e2e_ms": 3000}},
                {
                    "id": 2,
                    "waited_ms": 12.5,
                    "prompt_tokens": 10,
                    "output_tokens": 5,
                    "slo": {"ttft_ms": 900, "tpot_ms": 50},
                },
            ],
        }
    ).encode(),
)
_SLOS = (b"chat=ttft:1000,tpot:50\ndefault=e2e:30000", b"code=e2e:2e3")


def _target(
    name: str,
    examples: Sequence[bytes],
    take: Callable[[bytes], str],
    *,
    cost: int = 1,
    words: Sequence[bytes] = (),
) -> Target:
    return Target(name, lambda draw: mutated(draw, examples, words or NUMBERS), take, examples, cost)


TARGETS = (
    _target("traces", _TRACES, _reader(_traces, TraceError)),
    _target("conversations", _CONVERSATIONS, _reader(_conversations, TraceError)),
    _target("timelines", _TIMELINES, _reader(_timelines, TraceError)),
    _target("benchmark tables", _TABLES, _reader(_table, TraceError)),
    _target("profiles", _PROFILES, _reader(_profile, ConfigError, "profile.json")),
    _target("configuration", _CONFIGS, _reader(_config, ConfigError), cost=4),
    _target("client policies", _POLICIES, _reader(_policies, ConfigError)),
    _target("tokens", _TOKENS, _reader(_tokens, ConfigError)),
    _target("profiler state", _profiler_states(), _reader(_profiler_state, ConfigError)),
    _target("server state", _state_examples(), take_state, cost=4),
    _target("plan snapshots", _PLANS, _reader(_plan, ConfigError)),
    _target("slo options", _SLOS, take_slo_option),
)
