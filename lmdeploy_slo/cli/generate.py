"""`lmdeploy_slo generate`: one prompt to a server, the answer as it comes, and how it went.

The answer alone goes to stdout; timing and errors go to stderr.
"""

from __future__ import annotations

import dataclasses
import json as json_module
import re
import sys
from enum import Enum
from typing import Annotated, Any

import typer

from lmdeploy_slo.cli import connection
from lmdeploy_slo.client import (
    ChatMessage,
    Client,
    Completion,
    Forecast,
    Objectives,
    Prediction,
    PriorityClass,
    Prompt,
    ServerUnreachable,
    Timing,
)
from lmdeploy_slo.client.retry import LONGEST_TIMEOUT_S
from lmdeploy_slo.errors import Rejected, RequestError, SloError

_INTERRUPTED = 130
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
_SLO, _SCHEDULING, _OUTPUT = "What it promises", "What the scheduler should know", "What to generate"
_OTHER_SCHEMES = ("unix:", "dns:", "ipv4:", "ipv6:")
_LABELS = {"queue_ms": "queue", "ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2e_ms": "E2E"}


def check_target(target: str) -> str:
    """The target as it is; a usage error where gRPC would only say much later that it makes no sense."""
    host_port = _HOST_PORT.fullmatch(target)
    if target.startswith(_OTHER_SCHEMES) or (host_port and 0 < int(host_port[2]) <= 65535):
        return target
    raise typer.BadParameter(f"{target!r} is not HOST:PORT, such as localhost:50051")


def check_timeout(timeout_s: float | None) -> float | None:
    """The time limit as it is; a usage error where it is none."""
    if timeout_s is None or 0 < timeout_s <= LONGEST_TIMEOUT_S:
        return timeout_s
    raise typer.BadParameter(f"{timeout_s:g} is not a positive number of seconds, at most {LONGEST_TIMEOUT_S:.0f}")


class Tier(str, Enum):
    """The priority classes as they are typed."""

    BULK = "bulk"
    DEFAULT = "default"
    INTERACTIVE = "interactive"
    SYSTEM = "system"


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to answer; - reads stdin.")],
    target: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The server.", callback=check_target)
    ] = "127.0.0.1:50051",
    ttft_ms: Annotated[float | None, typer.Option(help="SLO: arrival to first token.", rich_help_panel=_SLO)] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(help="SLO: mean time per token after the first.", rich_help_panel=_SLO)
    ] = None,
    e2e_ms: Annotated[float | None, typer.Option(help="SLO: arrival to last token.", rich_help_panel=_SLO)] = None,
    task_type: Annotated[
        str | None,
        typer.Option(
            help="Kind of work, such as chat; for default SLOs and length prediction.", rich_help_panel=_SCHEDULING
        ),
    ] = None,
    expected_output_tokens: Annotated[
        int | None,
        typer.Option(help="Your guess of the output length; for planning only.", rich_help_panel=_SCHEDULING),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens to generate.", rich_help_panel=_OUTPUT)
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="Fewest tokens to generate.", rich_help_panel=_OUTPUT)
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=_OUTPUT)] = None,
    top_p: Annotated[float | None, typer.Option(help="Above 0, at most 1.", rich_help_panel=_OUTPUT)] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off.", rich_help_panel=_OUTPUT)] = None,
    min_p: Annotated[float | None, typer.Option(help="0 to 1.", rich_help_panel=_OUTPUT)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.", rich_help_panel=_OUTPUT)] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampled output repeatable.", rich_help_panel=_OUTPUT)] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ends the answer; may be repeated.", rich_help_panel=_OUTPUT),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Do not stop at end of sequence.", rich_help_panel=_OUTPUT)
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's turn, for the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System turn before it; implies --chat.")] = None,
    model: Annotated[str | None, typer.Option(help="Refuse any other model.")] = None,
    request_id: Annotated[str | None, typer.Option(help="Your name for the request.")] = None,
    fairness_id: Annotated[
        str | None,
        typer.Option(help="Whom the request is counted to; no policy looks at it yet.", rich_help_panel=_SCHEDULING),
    ] = None,
    priority_class: Annotated[
        Tier | None, typer.Option(help="Tier above the SLO.", rich_help_panel=_SCHEDULING)
    ] = None,
    sheddable: Annotated[
        bool,
        typer.Option("--sheddable", help="May be refused when its SLO cannot be met.", rich_help_panel=_SCHEDULING),
    ] = False,
    conversation_id: Annotated[
        str | None,
        typer.Option(help="Your name for the conversation it is a turn of.", rich_help_panel=_SCHEDULING),
    ] = None,
    queue_timeout_ms: Annotated[
        float | None, typer.Option(help="Longest wait before the engine starts.", rich_help_panel=_SCHEDULING)
    ] = None,
    timeout_s: Annotated[
        float | None, typer.Option(help="Give up after this long; a hard end, not an SLO.", callback=check_timeout)
    ] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Only ask whether it would meet its SLO now; nothing is generated.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead.")] = False,
    tls: connection.Tls = False,
    ca: connection.Ca = None,
    cert: connection.Cert = None,
    key: connection.Key = None,
    token: connection.Token = None,
    insecure: connection.Insecure = False,
) -> None:
    """Send one prompt to a server and stream the answer.

    The timing follows on stderr. Ctrl-C cancels the request in the server. Status 1: it failed; 2: wrong usage.
    """
    options = {
        "ttft_ms": ttft_ms,
        "tpot_ms": tpot_ms,
        "e2e_ms": e2e_ms,
        "task_type": task_type,
        "expected_output_tokens": expected_output_tokens,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
        "ignore_eos": ignore_eos or None,
        "model": model,
        "request_id": request_id,
        "fairness_id": fairness_id,
        "priority_class": None if priority_class is None else PriorityClass[priority_class.name],
        "sheddable": sheddable or None,
        "conversation_id": conversation_id,
        "queue_timeout_ms": queue_timeout_ms,
    }
    if timeout_s is not None:
        options["timeout_s"] = timeout_s
    turns = _prompt(prompt, chat, system)
    try:
        how = connection.access(tls=tls, ca=ca, cert=cert, key=key, token=token, insecure=insecure)
        with Client(target, credentials=how.credentials, token=how.token, insecure=how.insecure) as client:
            _run(client, turns, options, predict=predict, json=json)
    except KeyboardInterrupt:
        typer.echo("\ncancelled", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    except SloError as error:
        typer.echo(f"lmdeploy_slo: {describe_error(error, target)}", err=True)
        raise typer.Exit(1) from None


def _prompt(text: str, chat: bool, system: str | None) -> Prompt:
    if text == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise typer.BadParameter(f"stdin is not text in {error.encoding}") from None
    if not chat and system is None:
        return text
    return [*([] if system is None else [ChatMessage("system", system)]), ChatMessage("user", text)]


def _run(client: Client, prompt: Prompt, options: dict[str, Any], *, predict: bool, json: bool) -> None:
    if predict:
        forecast = client.predict(prompt, **options)
        typer.echo(_as_json(forecast) if json else describe_forecast(forecast))
    elif json:
        typer.echo(_as_json(client.generate(prompt, **options)))
    else:
        _stream(client, prompt, options)


def _stream(client: Client, prompt: Prompt, options: dict[str, Any]) -> None:
    text = ""
    with client.stream(prompt, **options) as stream:
        try:
            for chunk in stream:
                text = chunk.text or text
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        finally:
            if text and not text.endswith("\n"):
                sys.stdout.write("\n")
                sys.stdout.flush()
    for line in describe_completion(stream.completion):
        typer.echo(line, err=True)


def _as_json(result: Any) -> str:
    return json_module.dumps(dataclasses.asdict(result), ensure_ascii=False)


def describe_completion(completion: Completion) -> list[str]:
    """Three lines: what was measured, what had been predicted, what became of the SLO. What is unknown is left out."""
    usage = completion.usage
    reason = "" if completion.finish_reason is None else f" ({completion.finish_reason.value})"
    cached = "" if usage.cached_tokens is None else f", {usage.cached_tokens} cached"
    tokens = f"tokens: {usage.prompt_tokens} in{cached}, {usage.output_tokens} out{reason}"
    lines = [f"{tokens}  {_durations(completion.timing)}".rstrip(), f"predicted: {_predicted(completion.predicted)}"]
    if completion.slo_met is None:
        return [*lines, "no SLO"]
    return [*lines, f"SLO {'met' if completion.slo_met else 'missed'}: {_held_to(completion.slo, completion.timing)}"]


def describe_forecast(forecast: Forecast) -> str:
    """What a user reads of a forecast, in a few lines."""
    verdict = {None: "no SLO to meet", True: "would meet its SLO", False: "would miss its SLO"}
    reason = f": {forecast.reason}" if forecast.reason else ""
    predicted = forecast.predicted
    chance = "" if predicted.slo_probability is None else f" ({100 * predicted.slo_probability:.0f} % likely)"
    lines = [
        f"{verdict[forecast.would_meet_slo]}{chance}{reason}",
        f"waiting requests that would go before it: {forecast.queue_position}",
        f"predicted: {_predicted(predicted)}",
    ]
    reaches = _reaches(predicted)
    return "\n".join([*lines, f"in 8 of 10 cases: {reaches}"] if reaches else lines)


def describe_error(error: SloError, target: str) -> str:
    """One line: the reason, what happened, what to change or when to come back."""
    text = " ".join(str(error).split())
    if isinstance(error, Rejected) and error.retry_after_s is not None:
        return f"{error.reason}: {text} (try again in {error.retry_after_s:g} s)"
    if isinstance(error, RequestError):
        return f"{error.reason}: {text}"
    if isinstance(error, ServerUnreachable):
        return f"{'cannot reach' if error.not_sent else 'lost the connection to'} {target}: {text}"
    return text


def _predicted(predicted: Any) -> str:
    tokens = [] if predicted.output_tokens is None else [f"{predicted.output_tokens:.0f} tokens"]
    return "  ".join([*tokens, *filter(None, [_durations(predicted)])]) or "nothing"


def _reaches(predicted: Prediction) -> str:
    tokens = predicted.output_tokens_interval
    parts = [] if tokens is None else [f"{tokens.low:.0f} to {tokens.high:.0f} tokens"]
    for name, label in _LABELS.items():
        interval = getattr(predicted, f"{name}_interval")
        if interval is not None:
            parts.append(f"{label} {interval.low:.1f} to {interval.high:.1f} ms")
    return "  ".join(parts)


def _durations(source: Any) -> str:
    values = ((label, getattr(source, name)) for name, label in _LABELS.items())
    return "  ".join(f"{label} {value:.1f} ms" for label, value in values if value is not None)


def _held_to(slo: Objectives, timing: Timing) -> str:
    verdicts = []
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        limit, measured = getattr(slo, name), getattr(timing, name)
        if limit is not None:
            late = " (missed)" if measured is not None and measured > limit else ""
            verdicts.append(f"{_LABELS[name]} within {limit:g} ms{late}")
    return ", ".join(verdicts)
