"""`lmdeploy_slo explain`: why a request waited, as a timeline that reads from top to bottom."""

from __future__ import annotations

import dataclasses
import json as json_module
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lmdeploy_slo.cli import connection
from lmdeploy_slo.cli.generate import check_target, describe_error
from lmdeploy_slo.client import Client, Explanation, QueuePlace, RequestState, SentRequest
from lmdeploy_slo.errors import SloError

_PLACES_SHOWN = 16


def explain(
    request_id: Annotated[str, typer.Argument(help="The request, as its client or the server named it.")],
    target: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The server.", callback=check_target)
    ] = "127.0.0.1:50051",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead.")] = False,
    tls: connection.Tls = False,
    ca: connection.Ca = None,
    cert: connection.Cert = None,
    key: connection.Key = None,
    token: connection.Token = None,
    insecure: connection.Insecure = False,
) -> None:
    """Tell why a request waited: its places in the queue, what went before it and at what price.

    For requests that wait or run, and for the last ones that ended. Status 1: the server remembers nothing of it.
    """
    try:
        how = connection.access(tls=tls, ca=ca, cert=cert, key=key, token=token, insecure=insecure)
        with Client(target, credentials=how.credentials, token=how.token, insecure=how.insecure) as client:
            told = client.explain(request_id)
    except SloError as error:
        typer.echo(f"lmdeploy_slo: {describe_error(error, target)}", err=True)
        raise typer.Exit(1) from None
    if json:
        typer.echo(json_module.dumps(to_json(told)))
        return
    console = Console(soft_wrap=True)
    for line in story(told):
        console.print(line, markup=False, highlight=False)
    if told.dearest:
        title = "dearest first to last sent" if told.sent_before.requests > len(told.dearest) else "what went before it"
        console.print(sent_table(told.dearest, title))


def to_json(told: Explanation) -> dict[str, object]:
    """By the names of the wire protocol."""
    values = dataclasses.asdict(told)
    values["state"] = None if told.state is None else told.state.value
    values["priority_class"] = told.priority_class.name.lower()
    for sent in (values["sent"], *values["dearest"]):
        if sent is not None:
            sent["priority_class"] = sent["priority_class"].name.lower()
    return values


def story(told: Explanation) -> Iterator[str]:
    """The timeline, line by line."""
    task = f"{told.task_type}, " if told.task_type else ""
    yield f"{told.request_id} ({task}{told.priority_class.name.lower()}): {_verdict(told)}"
    yield f"    {_objectives(told)}"
    yield ""
    yield from _timeline(told)
    yield ""
    yield from _wait(told)
    yield from _before(told)


def sent_table(sent: tuple[SentRequest, ...], title: str) -> Table:
    """Requests that were sent before it."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("sent at ms", "arrived ms", "class", "prompt", "output", "engine ms", "to spare ms", "cost"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for each in sent:
        table.add_row(
            f"{each.at_ms:,.0f}",
            f"{each.arrived_ms:+,.0f}",
            each.priority_class.name.lower(),
            f"{each.prompt_tokens:,}",
            f"~{each.output_tokens:,.0f}",
            f"{each.engine_ms:,.1f}",
            _spare(each.spare_ms),
            "-" if each.cost is None else f"{each.cost:.3f}",
        )
    return table


def _verdict(told: Explanation) -> str:
    if told.state is RequestState.WAITING:
        return "waiting"
    if told.state is RequestState.RUNNING:
        return "running"
    met = {True: ", SLO met", False: ", SLO missed", None: ""}[told.slo_met]
    return f"ended ({told.reason}){met}"


def _objectives(told: Explanation) -> str:
    rows = []
    for name in ("ttft", "tpot", "e2e"):
        field = f"{name}_ms"
        limit, took, expected = (getattr(part, field) for part in (told.slo, told.timing, told.predicted))
        if limit is not None:
            missed = took is not None and took > limit
            seen = "" if took is None else f", was {took:,.0f} ms" + (": missed" if missed else "")
            foreseen = "" if expected is None else f", {expected:,.0f} expected"
            rows.append(f"{name.upper()} within {limit:,.0f} ms{foreseen}{seen}")
    return "; ".join(rows) or "no objectives"


def _timeline(told: Explanation) -> Iterator[str]:
    queue_ms, ttft_ms, e2e_ms = told.timing.queue_ms, told.timing.ttft_ms, told.timing.e2e_ms
    expected = told.predicted
    forecast = "" if expected.queue_ms is None else f", a wait of {expected.queue_ms:,.0f} ms expected"
    yield _at(0.0, f"arrived with {told.prompt_tokens:,} prompt tokens, behind {told.arrival_position:,}{forecast}")
    for place in _changes(told.places):
        yield _at(place.at_ms, _place(place))
    if queue_ms is not None:
        rank = "" if told.sent is None else f", place {told.sent.rank + 1} of its plan"
        late = "" if told.sent is None or told.sent.spare_ms is None else f", {_spare(told.sent.spare_ms)} ms to spare"
        yield _at(queue_ms, f"sent to the engine{rank}{late}")
    if ttft_ms is not None:
        yield _at(ttft_ms, "first token")
    if told.state is RequestState.ENDED:
        output = 0 if told.output_tokens is None else told.output_tokens
        guess = "" if expected.output_tokens is None else f" (~{expected.output_tokens:,.0f} expected)"
        yield _at(told.wait.total_ms if e2e_ms is None else e2e_ms, f"ended: {told.reason}, {output:,} tokens{guess}")


def _changes(places: tuple[QueuePlace, ...]) -> list[QueuePlace]:
    """Those where something had changed, or some of them where they are many; the first, the last, and the one from
    which on it was too late, always."""
    chosen: list[int] = []
    for number, place in enumerate(places):
        before = places[chosen[-1]] if chosen else None
        if before is None or place.position != before.position or _is_late(place) != _is_late(before):
            chosen.append(number)
    turned = [n for n in chosen[1:] if _is_late(places[n]) != _is_late(places[n - 1])]
    step = max(1, -(-len(chosen) // _PLACES_SHOWN))
    return [places[n] for n in sorted({*chosen[::step], *turned[:1], len(places) - 1} if places else ())]


def _is_late(place: QueuePlace) -> bool:
    return place.spare_ms is not None and place.spare_ms < 0


def _place(place: QueuePlace) -> str:
    text = f"place {place.position + 1:,} of {place.waiting:,}, {place.in_flight:,} in the engine, {place.sent:,} sent"
    if place.spare_ms is None:
        return text
    late = "too late for its SLO by then" if _is_late(place) else f"{place.spare_ms:,.0f} ms to spare"
    return f"{text}; {late}"


def _wait(told: Explanation) -> Iterator[str]:
    wait, verb = told.wait, "has waited" if told.state is RequestState.WAITING else "waited"
    parts = [
        (wait.engine_full_ms, "with the engine full"),
        (wait.held_back_ms, "held back with free places in the engine"),
        (wait.planning_ms, "until the first plan"),
    ]
    rows = ", ".join(f"{ms:,.0f} ms {why}" for ms, why in parts if ms >= 0.5)
    yield f"It {verb} {wait.total_ms:,.0f} ms" + (f": {rows}." if rows else ".")


def _before(told: Explanation) -> Iterator[str]:
    before = told.sent_before
    if not before.requests:
        yield "Nothing was sent before it."
        return
    price = "" if before.cost is None else f", at a cost of {before.cost:.2f} requests met"
    yield (
        f"{before.requests:,} requests were sent before it, {before.overtook:,} of which arrived after it: "
        f"{before.prompt_tokens:,} prompt tokens, {before.engine_ms:,.0f} ms of engine time{price}."
    )
    if not told.complete:
        yield "Some of them are forgotten: these sums are too small."


def _at(at_ms: float, text: str) -> str:
    return f"{at_ms:>10,.0f} ms  {text}"


def _spare(spare_ms: float | None) -> str:
    return "-" if spare_ms is None else f"{spare_ms:,.0f}"
