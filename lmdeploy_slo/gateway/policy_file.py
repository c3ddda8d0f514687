"""The client policy file: what each client may claim and use, in TOML.

    [default]                               # whoever is not named below
    classes = ["bulk", "default"]           # priority classes; a higher claim is lowered
    tightest_slo = { ttft_ms = 200 }        # a tighter claim is loosened to this; likewise tpot_ms, e2e_ms
    loosest_slo = { e2e_ms = 600_000 }
    sheddable = true                        # whatever the request says
    length_hints = false                    # expected_output_tokens is not believed
    max_queue_timeout_ms = 30_000
    max_streams = 64
    max_queued_requests = 200
    max_queued_tokens = 400_000
    tokens_per_s = 2000
    burst_tokens = 20_000

    [clients.chat-frontend]                 # what is not said here is as in [default]
    classes = ["bulk", "default", "interactive"]
    names_users = true                      # its fairness_id names the user; each is counted by itself
    operator = true                         # may look at and abort other clients' requests

A user that chat-frontend names is `chat-frontend/USER`: it has the policy of that name, else that of chat-frontend.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmdeploy_slo.core.clients import FREE, ClientPolicies, ClientPolicy
from lmdeploy_slo.core.request import PriorityClass
from lmdeploy_slo.core.slo import Slo, seconds_of
from lmdeploy_slo.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_Milliseconds = Annotated[float, Field(gt=0, le=86_400_000.0)]
_Count = Annotated[int, Field(ge=1)]
_ClassName = Literal["bulk", "default", "interactive", "system"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Objectives(_Strict):
    ttft_ms: _Milliseconds | None = None
    tpot_ms: _Milliseconds | None = None
    e2e_ms: _Milliseconds | None = None

    @property
    def slo(self) -> Slo:
        return Slo(*(None if v is None else seconds_of(v) for v in (self.ttft_ms, self.tpot_ms, self.e2e_ms)))


class _Policy(_Strict):
    classes: list[_ClassName] | None = Field(default=None, min_length=1)
    tightest_slo: _Objectives | None = None
    loosest_slo: _Objectives | None = None
    sheddable: bool | None = None
    length_hints: bool | None = None
    max_queue_timeout_ms: _Milliseconds | None = None
    names_users: bool | None = None
    operator: bool | None = None
    max_streams: _Count | None = None
    max_queued_requests: _Count | None = None
    max_queued_tokens: _Count | None = None
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    burst_tokens: Annotated[float, Field(ge=1)] | None = None

    def over(self, base: ClientPolicy) -> ClientPolicy:
        """The base with what is said here."""
        said: dict[str, Any] = {
            field.name: value
            for field in fields(ClientPolicy)
            if (value := getattr(self, field.name, None)) is not None
        }
        if self.classes is not None:
            said["classes"] = frozenset(PriorityClass[name.upper()] for name in self.classes)
        for name in ("tightest_slo", "loosest_slo"):
            if name in said:
                said[name] = said[name].slo
        if self.max_queue_timeout_ms is not None:
            said["max_queue_timeout_s"] = seconds_of(self.max_queue_timeout_ms)
        return replace(base, **said) if said else base


class _File(_Strict):
    default: _Policy = _Policy()
    clients: dict[Annotated[str, Field(min_length=1, max_length=257)], _Policy] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> _File:
        default = self.default.over(FREE)
        for name, policy in (("default", default), *((n, p.over(default)) for n, p in self.clients.items())):
            for objective in ("ttft_s", "tpot_s", "e2e_s"):
                least, most = (getattr(slo, objective) for slo in (policy.tightest_slo, policy.loosest_slo))
                if least is not None and most is not None and least > most:
                    raise ValueError(f"{name}: the tightest {objective[:-2]}_ms is above the loosest")
        return self


def read_policies(file: Path, base: ClientPolicy = FREE) -> ClientPolicies:
    """base: what neither the client nor [default] says. Raises ConfigError with all that is wrong."""
    try:
        document = _File.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())
        raise ConfigError(f"{file}: {'; '.join(wrong)}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or nested too deeply
        raise ConfigError(f"{file}: not TOML: {error}") from error
    default = document.default.over(base)
    return ClientPolicies(default, {name: policy.over(default) for name, policy in document.clients.items()})
