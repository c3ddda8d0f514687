"""`lmdeploy_slo plan`: the static plan for a list of requests, as JSON on stdout and nothing else there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lmdeploy_slo.core.latency_model import BilinearModel
from lmdeploy_slo.core.slo import NO_SLO, Slo, seconds_of
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.scheduling.static_model import MAX_BATCH_SIZE, MAX_REQUESTS, StaticPlan, StaticProblem, StaticRequest

_ANNEALING = "annealing"
_LARGEST_SEED = 2**64 - 1
_SHOWN = 60  # characters of a wrong value
_TOLD = {"missing": "is missing", "extra_forbidden": "is unknown", "model_type": "must be an object"}


def _check_id(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError("must be a string with at least one character, or an integer")
    return value


_Id = Annotated[Any, BeforeValidator(_check_id)]
_Tokens = Annotated[int, Field(strict=True, ge=1, le=10_000_000)]
_BatchSize = Annotated[int, Field(strict=True, ge=1, le=MAX_BATCH_SIZE)]
_Coefficient = Annotated[float, Field(strict=True, ge=0, le=1e6, allow_inf_nan=False)]
_Coefficients = Annotated[list[_Coefficient], Field(min_length=4, max_length=4)]
_WaitedMs = Annotated[float, Field(strict=True, ge=0, le=1e12, allow_inf_nan=False)]
_ObjectiveMs = Annotated[float, Field(strict=True, gt=0, le=1e12, allow_inf_nan=False)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Slo(_Checked):
    e2e_ms: _ObjectiveMs | None = None
    ttft_ms: _ObjectiveMs | None = None
    tpot_ms: _ObjectiveMs | None = None

    def in_seconds(self) -> Slo:
        return Slo(*(None if v is None else seconds_of(v) for v in (self.ttft_ms, self.tpot_ms, self.e2e_ms)))


class _Request(_Checked):
    id: _Id
    prompt_tokens: _Tokens
    output_tokens: _Tokens
    slo: _Slo | None = None
    waited_ms: _WaitedMs = 0.0


class _Latency(_Checked):
    prefill: _Coefficients
    decode: _Coefficients


class _Snapshot(_Checked):
    max_batch_size: _BatchSize
    latency: _Latency
    requests: Annotated[list[_Request], Field(min_length=1, max_length=MAX_REQUESTS)]

    def problem(self) -> StaticProblem:
        a, b, c, d = (v / 1e3 for v in self.latency.prefill)
        e, f, g, h = (v / 1e3 for v in self.latency.decode)
        requests = (
            StaticRequest(
                r.prompt_tokens, r.output_tokens, NO_SLO if r.slo is None else r.slo.in_seconds(), r.waited_ms / 1e3
            )
            for r in self.requests
        )
        return StaticProblem(tuple(requests), self.max_batch_size, BilinearModel((a, b, c, d), (e, f, g, h)))


def plan(
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT.json", help="The requests; - reads them from stdin.")],
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Of the annealing.")] = 0,
    policy: Annotated[
        str,
        typer.Option(
            help="annealing, or full batches by fcfs, sjf, swf, edf or llf, each also with -feasible appended."
        ),
    ] = _ANNEALING,
    early_stop: Annotated[
        bool, typer.Option("--early-stop", help="Take the start as it is where it meets every SLO.")
    ] = False,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Try all plans, of up to 8 requests.")] = False,
) -> None:
    """Print the static plan for a list of requests: batches that run one after the other.

    SNAPSHOT.json is an object with max_batch_size, latency (prefill and decode, a list of four coefficients each) and
    requests, a list of objects with id, prompt_tokens, output_tokens, slo (null or any of e2e_ms, ttft_ms, tpot_ms)
    and, where it has waited already, waited_ms. Coefficients and times are in milliseconds.

    The answer has the batches of ids, the objective G per second, how many requests meet their SLO, the sum of all
    end-to-end times, how many plans were scored, and how long the search took, without reading and compiling.
    """
    if policy != _ANNEALING and (exhaustive or early_stop):
        raise ConfigError("--exhaustive and --early-stop make no sense with a fixed --policy")
    if exhaustive and early_stop:
        raise ConfigError("--exhaustive tries all plans and has no start to stop at; leave --early-stop out")
    given = _read(snapshot)
    found = _search(given.problem(), seed, policy, early_stop, exhaustive)
    ids = [request.id for request in given.requests]
    answer = {
        "batches": [[ids[index] for index in batch] for batch in found.batches],
        "objective": found.objective,
        "met": found.met,
        "sum_e2e_ms": found.sum_e2e_s * 1e3,
        "evaluations": found.evaluations,
        "elapsed_ms": found.elapsed_s * 1e3,
    }
    typer.echo(json.dumps(answer))


def _search(problem: StaticProblem, seed: int, policy: str, early_stop: bool, exhaustive: bool) -> StaticPlan:
    from lmdeploy_slo.scheduling import static_planner  # numba: only for a snapshot that is in order

    if policy != _ANNEALING:
        if policy not in static_planner.RULES:
            allowed = ", ".join((_ANNEALING, *static_planner.RULES))
            raise ConfigError(f"--policy: {policy!r} is not one of {allowed}")
        return static_planner.follow_rule(problem, policy)
    limit = static_planner.MAX_ENUMERATED
    if exhaustive and len(problem.requests) > limit:
        raise ConfigError(f"--exhaustive takes up to {limit} requests, the snapshot has {len(problem.requests)}")
    static_planner.warm_up()
    if exhaustive:
        return static_planner.enumerate_all(problem)
    return static_planner.anneal(problem, seed=seed, early_stop=early_stop)


def _read(path: str) -> _Snapshot:
    """The snapshot in a file, or on stdin for "-"; raises ConfigError that names the file and the field."""
    name = "stdin" if path == "-" else path
    try:
        text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode()
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: not UTF-8 text") from None
    try:
        snapshot = _Snapshot.model_validate(json.loads(text, object_pairs_hook=_once_each))
    except ValidationError as error:
        raise ConfigError(f"{name}: {_explain(error)}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not JSON: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    seen: dict[Any, int] = {}
    for index, request in enumerate(snapshot.requests):
        if request.id in seen:
            raise ConfigError(
                f"{name}: requests[{index}].id: {request.id!r} is that of requests[{seen[request.id]}] too"
            )
        seen[request.id] = index
    return snapshot


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary; raises ValueError where it has a key twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice in one object")
    return members


def _explain(error: ValidationError) -> str:
    """The first wrong field, what is allowed there and what it was, in one line."""
    first, *others = error.errors(include_url=False)
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in first["loc"]).lstrip(".")
    told = _TOLD.get(first["type"], first["msg"].removeprefix("Value error, "))
    value = first["input"]
    if isinstance(value, (str, int, float)) and first["type"] != "extra_forbidden":
        told += f", got '{_shown(value)}'" if isinstance(value, str) else f", got {_shown(str(value))}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{field or 'the snapshot'}: {told}{more}"


def _shown(text: str) -> str:
    """At most `_SHOWN` characters of somebody else's text, none of which can move the cursor."""
    return text[:_SHOWN].encode("unicode_escape").decode()
