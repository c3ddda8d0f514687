"""`lmdeploy_slo top`: a live view of a server: queue, running, attainment by task, plan quality; from its GetLoad."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lmdeploy_slo.cli import connection
from lmdeploy_slo.cli.generate import check_target, describe_error
from lmdeploy_slo.client import Client, Load, ModelInfo, PlanQuality, ReplicaLoad, ServerInfo, TaskLoad
from lmdeploy_slo.clock import Clock, MonotonicClock
from lmdeploy_slo.errors import SloError

_BAR_WIDTH = 24
_MINUTE_S = 60.0
_GOOD, _FAIR = 0.99, 0.9


def top(
    target: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="The server.", callback=check_target)
    ] = "127.0.0.1:50051",
    interval_s: Annotated[float, typer.Option(min=0.1, max=60, help="Time between two frames.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
    tls: connection.Tls = False,
    ca: connection.Ca = None,
    cert: connection.Cert = None,
    key: connection.Key = None,
    token: connection.Token = None,
    insecure: connection.Insecure = False,
) -> None:
    """Watch a server: its queue, what runs, SLO attainment by task, how good its plans are.

    Ctrl-C ends it. Figures by task are of the last minute.
    """
    console = Console()
    try:
        how = connection.access(tls=tls, ca=ca, cert=cert, key=key, token=token, insecure=insecure)
        with Client(target, credentials=how.credentials, token=how.token, insecure=how.insecure) as client:
            pictures = look(client, target, time.sleep, interval_s)
            if once:
                console.print(frame(next(pictures)))
                return
            with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
                for picture in pictures:
                    live.update(frame(picture), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    except SloError as error:
        typer.echo(f"lmdeploy_slo: {describe_error(error, target)}", err=True)
        raise typer.Exit(1) from None


@dataclass(frozen=True, slots=True)
class Picture:
    """A server at an instant; before: its load, and how long ago, at the last picture; None for the first."""

    target: str
    server: ServerInfo
    model: ModelInfo
    load: Load
    before: tuple[Load, float] | None = None

    def per_s(self, read: Callable[[Load], int]) -> float | None:
        """How fast a counter grows; None for the first picture, and where it fell, since the server was restarted."""
        if self.before is None:
            return None
        load, ago_s = self.before
        grown = read(self.load) - read(load)
        return grown / ago_s if grown >= 0 and ago_s > 0 else None


def look(
    client: Client, target: str, sleep: Callable[[float], None], interval_s: float, clock: Clock | None = None
) -> Iterator[Picture]:
    """Pictures of a server, one every `interval_s` seconds, without end; raises what the client raises."""
    clock = clock or MonotonicClock()
    model = client.model_info()
    before: tuple[Load, float] | None = None
    while True:
        server, load, at_s = client.server_info(), client.load(), clock.now_s()
        yield Picture(target, server, model, load, None if before is None else (before[0], at_s - before[1]))
        before = (load, at_s)
        sleep(interval_s)


# -- one frame ------------------------------------------------------------------------------------------------------


def frame(picture: Picture) -> RenderableType:
    """What is shown of a picture."""
    parts = [_header(picture), _numbers(picture), _tasks(picture.load.last_minute), _plans(picture)]
    if len(picture.load.replicas) > 1:
        parts.insert(2, _replicas(picture.load.replicas))
    return Group(*parts)


def _header(picture: Picture) -> RenderableType:
    server, model = picture.server, picture.model
    what = "synthetic tokens" if model.synthetic else model.model
    state = ("draining", "bold red") if picture.load.draining else ("serving", "green")
    first = Text.assemble((picture.target, "bold"), "  ", state, f"  up {_duration(server.uptime_s)}")
    second = Text(f"lmdeploy_slo {server.version}, {model.engine} ({what}), policy {server.policy}")
    return Group(first, second)


def _numbers(picture: Picture) -> RenderableType:
    load = picture.load
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right", min_width=6)
    table.add_column()
    queued = [f"{load.waiting_prompt_tokens:,} prompt tokens"]
    if picture.server.max_queued_requests is not None:
        queued.insert(0, f"of {picture.server.max_queued_requests:,}")
    if load.oldest_wait_ms is not None:
        queued.append(f"oldest for {_duration(load.oldest_wait_ms / 1e3)}")
    table.add_row("waiting", f"{load.waiting:,}", ", ".join(queued))
    running = f"of {load.max_in_flight:,}" + ("" if load.kv_usage is None else f", KV cache {load.kv_usage:.0%}")
    bar = ProgressBar(total=max(1, load.max_in_flight), completed=load.in_flight, width=_BAR_WIDTH)
    table.add_row("running", f"{load.in_flight:,}", Columns([bar, running]))
    tokens_s = picture.per_s(lambda seen: seen.output_tokens)
    ended_s = sum(task.requests for task in load.last_minute) / _MINUTE_S
    generated_s = sum(task.output_tokens for task in load.last_minute) / _MINUTE_S
    last_minute = f"last minute: {generated_s:,.0f} of what has ended, {ended_s:,.1f} requests/s"
    table.add_row("tokens/s", _number(tokens_s, 0), last_minute)
    others = ("rejected", "timed_out", "failed", "cancelled")
    counts = ", ".join(f"{getattr(load, name):,} {name.replace('_', ' ')}" for name in others)
    table.add_row("finished", f"{load.finished:,}", counts)
    refused = sorted(load.refused.items(), key=lambda reason: -reason[1])
    if refused:
        table.add_row(
            "refused", f"{sum(load.refused.values()):,}", ", ".join(f"{n:,} {reason}" for reason, n in refused)
        )
    return Panel(table, title="now", title_align="left")


def _replicas(replicas: tuple[ReplicaLoad, ...]) -> RenderableType:
    table = Table(expand=True, box=None, header_style="bold")
    for name in ("engine", "", "waiting", "running", "KV cache", "restarts", "forecasts off by"):
        table.add_column(name, justify="left" if name in ("engine", "") else "right", overflow="fold")
    for one in replicas:
        state = ("draining", "yellow") if one.draining else ("up", "green") if one.up else ("down", "bold red")
        steps = one.step_forecasts
        table.add_row(
            one.instance,
            Text(*state),
            f"{one.waiting:,}",
            f"{one.in_flight:,} of {one.max_in_flight:,}",
            "-" if one.kv_usage is None else f"{one.kv_usage:.0%}",
            f"{one.engine_restarts:,}",
            f"{steps.relative_error:.1%}" if steps.windows else "-",
        )
    return Panel(table, title="engines", title_align="left")


def _tasks(tasks: tuple[TaskLoad, ...]) -> RenderableType:
    if not tasks:
        return Panel("nothing has ended", title="SLOs, last minute", title_align="left")
    table = Table(expand=True, box=None, header_style="bold")
    for name in ("task", "ended", "met", "missed", "TTFT ms", "TPOT ms"):
        table.add_column(name, justify="left" if name in ("task", "missed") else "right", overflow="fold")
    for task in tasks:
        misses = {
            "ttft": task.broke_ttft,
            "tpot": task.broke_tpot,
            "e2e": task.broke_e2e,
            "unfinished": task.unfinished,
        }
        table.add_row(
            task.task,
            f"{task.requests:,}",
            _attainment(task),
            ", ".join(f"{name} {count:,}" for name, count in misses.items() if count),
            _number(task.mean_ttft_ms),
            _number(task.mean_tpot_ms),
        )
    return Panel(table, title="SLOs, last minute (means of what finished)", title_align="left")


def _plans(picture: Picture) -> RenderableType:
    load = picture.load
    plans_s = picture.per_s(lambda seen: seen.plans)
    parts = [
        f"{load.plans:,} plans" if plans_s is None else f"{plans_s:,.0f} plans/s",
        f"last {_number(load.last_plan_ms, 2)} ms, mean {_number(load.mean_plan_ms, 2)} ms",
    ]
    if load.last_plan is not None and load.last_plan.evaluations:
        parts += _quality(load.last_plan)
    steps = load.step_forecasts
    if steps.windows:
        parts.append(f"steps are foreseen within {steps.relative_error:.1%}")
    line = Text("   ".join(parts))
    if steps.drifting:
        line.append(f"   the engine has drifted: {steps.slowness:.2f} x its profile", "bold yellow")
    if load.failed_plans:
        line.append(f"   {load.failed_plans:,} failed", "bold red")
    return Panel(line, title="plans", title_align="left")


def _quality(plan: PlanQuality) -> list[str]:
    parts = [f"{plan.evaluations:,} scored"]
    if plan.start:
        gain = plan.score - plan.start_score
        parts.append(f"from {plan.start}: {plan.score:.2f} requests met, {gain:+.2f} by the search")
    if plan.engine_second_price is not None:
        parts.append(f"a second of engine time is worth {plan.engine_second_price:.2f}")
    return parts


def _attainment(task: TaskLoad) -> Text:
    if not task.with_slo:
        return Text("-")
    share = task.slo_met / task.with_slo
    return Text(f"{share:.1%}", "green" if share >= _GOOD else "yellow" if share >= _FAIR else "red")


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _duration(duration_s: float) -> str:
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
