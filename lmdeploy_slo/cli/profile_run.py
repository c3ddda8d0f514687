"""`lmdeploy_slo profile run`: measures a running gateway, or an engine started for it, and writes a profile."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from lmdeploy_slo import __version__
from lmdeploy_slo.cli import connection
from lmdeploy_slo.cli.generate import check_target
from lmdeploy_slo.cli.profile_show import show_errors
from lmdeploy_slo.cli.replay import run_event_loop
from lmdeploy_slo.client.channel import Access
from lmdeploy_slo.clock import Clock, MonotonicClock, unix_time_s
from lmdeploy_slo.config import Config, EngineKind, load
from lmdeploy_slo.errors import ConfigError, MissingExtra
from lmdeploy_slo.offline.profiler.artifact import Measured, Notes, make_profile
from lmdeploy_slo.offline.profiler.client_target import client_target
from lmdeploy_slo.offline.profiler.engine_target import engine_target
from lmdeploy_slo.offline.profiler.profiler import Effort, Profiler, Progress, limits_of
from lmdeploy_slo.offline.profiler.state import ProfilerState, identity_of, load_state
from lmdeploy_slo.offline.profiler.target import Target, TargetInfo
from lmdeploy_slo.offline.results import check_writable
from lmdeploy_slo.prediction.profiles import save_profile

_INTERRUPTED = 130
_AT_ONCE = "fcfs"  # the policy that holds nothing back
_WHAT, _ENGINE, _EFFORT, _NOTED = "What to measure", "An engine for --engine", "How well", "What to note"


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is measured: a gateway at `address`, or the engine of `config`; up to so much of it."""

    address: str | None
    access: Access
    config: Config | None
    max_batch_size: int | None
    max_session_tokens: int | None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """finished: it was not interrupted."""

    info: TargetInfo
    profiler: Profiler
    state: ProfilerState
    finished: bool


def run(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Write the profile, a .json file.")],
    target: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A gateway that nobody else uses.", rich_help_panel=_WHAT),
    ] = None,
    engine: Annotated[
        EngineKind | None,
        typer.Option(help="Start this engine here, without a gateway.", rich_help_panel=_WHAT),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Requests at once, at most; default: as many as it takes.", rich_help_panel=_WHAT),
    ] = None,
    max_session_tokens: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Prompt and output, at most; default: the engine's own bound, else 8192.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="For lmdeploy: a directory or a Hugging Face id.", rich_help_panel=_ENGINE),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="For emulated: how fast it is, a profile by name or file.", rich_help_panel=_ENGINE),
    ] = None,
    max_prefill_tokens: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens per forward pass, at most.", rich_help_panel=_ENGINE)
    ] = None,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="KV cache, tokens.", rich_help_panel=_ENGINE)] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with the rest, as for serve; the environment counts, too.", rich_help_panel=_ENGINE
        ),
    ] = None,
    budget_s: Annotated[
        float,
        typer.Option(min=1, help="Time for all of it, interrupted runs included.", rich_help_panel=_EFFORT),
    ] = Effort().budget_s,
    precision: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=50,
            help="Repeat a point until half of its 95 % confidence interval is within so many per cent.",
            rich_help_panel=_EFFORT,
        ),
    ] = 100 * Effort().precision,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure anew what an earlier run has left.", rich_help_panel=_EFFORT)
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts, which are random.", rich_help_panel=_EFFORT)] = 0,
    tls: connection.Tls = False,
    ca: connection.Ca = None,
    cert: connection.Cert = None,
    key: connection.Key = None,
    token: connection.Token = None,
    insecure: connection.Insecure = False,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write the page here; default: beside FILE.", rich_help_panel=_NOTED),
    ] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Write no page.", rich_help_panel=_NOTED)] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the profile; default: that of FILE.", rich_help_panel=_NOTED)
    ] = None,
    gpu: Annotated[str, typer.Option(help="To be noted in the profile.", rich_help_panel=_NOTED)] = "",
    dtype: Annotated[str, typer.Option(help="To be noted in the profile.", rich_help_panel=_NOTED)] = "",
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="To be noted in the profile.", rich_help_panel=_NOTED)
    ] = None,
) -> None:
    """Measure how long an engine takes, and write a profile of it.

    Prompts of several lengths are computed alone, together, and beside decoding sequences; batches of several sizes
    decode at several contexts. Each is repeated until it is known well enough or the time is up.

    Ctrl-C stops it. What was measured is kept beside FILE, in FILE's name with .samples.json, and the same command goes
    on from there. docs/profiles.md says what is measured, and how.
    """
    if (target is None) == (engine is None):
        raise ConfigError("profile run measures either --target HOST:PORT or --engine emulated|lmdeploy")
    if target is not None:
        _refuse_engine_options(
            model=model, profile=profile, max_prefill_tokens=max_prefill_tokens, kv_tokens=kv_tokens, config=config
        )
        check_target(target)
    access = connection.access(tls=tls, ca=ca, cert=cert, key=key, token=token, insecure=insecure)
    if out.suffix != ".json":
        raise ConfigError(f"--out {out}: a profile is a .json file")
    samples = out.with_name(out.stem + ".samples.json")
    page = None if no_page else _page_path(page, out)
    check_writable([out, samples, page])
    if fresh:
        samples.unlink(missing_ok=True)
    effective = None
    if engine is not None:
        effective = load(
            config,
            flags={
                "engine.kind": engine.value,
                "engine.model": model,
                "engine.profile": profile,
                "engine.max_batch_size": max_batch_size,
                "engine.max_prefill_tokens": max_prefill_tokens,
                "engine.kv_tokens": kv_tokens,
                "engine.max_session_tokens": max_session_tokens,
            },
        )
    console = Console()
    effort = Effort(budget_s=budget_s, precision=precision / 100)
    subject = _Subject(target, access, effective, max_batch_size, max_session_tokens)
    outcome = _measure(subject, samples, effort, seed)
    if not outcome.finished:
        console.print(f"interrupted: the same command goes on from {samples}", markup=False, highlight=False)
        raise typer.Exit(_INTERRUPTED)
    turbomind = {} if effective is None else effective.engine.turbomind
    notes = Notes(
        name=name or out.stem,
        date=time.strftime("%Y-%m-%d", time.gmtime(unix_time_s())),
        source=_source(outcome),
        gpu=gpu,
        dtype=dtype or str(turbomind.get("dtype", "")),
        tensor_parallel=tensor_parallel or int(turbomind.get("tp", 1)),
    )
    measured = make_profile(outcome.state, outcome.profiler.points, outcome.info, notes)
    save_profile(measured.profile, out)
    if page is not None:
        from lmdeploy_slo.offline.profiler.page import write_page  # matplotlib

        write_page(page, measured, outcome.state, outcome.profiler.points, command_line(), _settings(outcome, effort))
    show_errors(console, measured.profile)
    for line in remarks(outcome.state, outcome.info, measured, (out, samples, page)):
        console.print(line, markup=False, highlight=False)


def _refuse_engine_options(**options: object) -> None:
    given = [f"--{key.replace('_', '-')}" for key, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"{', '.join(given)}: of an engine that is started here, not of a --target that runs already")


def _page_path(page: Path | None, out: Path) -> Path | None:
    """Where the page goes; None where nobody asked for one and matplotlib is not there to draw it."""
    if importlib.util.find_spec("matplotlib") is None:
        if page is not None:
            raise MissingExtra("--page", "report")
        return None
    return page or out.with_suffix(".html")


def command_line() -> str:
    """What was typed."""
    import shlex

    return shlex.join(["lmdeploy_slo", *sys.argv[1:]])


# -- measuring ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _open(subject: _Subject, clock: Clock) -> AsyncIterator[Target]:
    if subject.address is not None:
        async with client_target(subject.address, clock, subject.access) as remote:
            yield remote
        return
    assert subject.config is not None, "either a target or an engine is measured"
    from lmdeploy_slo import app, engines

    app.check(subject.config)
    async with engine_target(engines.build_engine(subject.config, clock), clock) as own:
        yield own


def _measure(subject: _Subject, samples: Path, effort: Effort, seed: int) -> _Outcome:
    """Measures with a progress line on stderr; the first Ctrl-C stops it."""
    clock = MonotonicClock()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[left]}"),
    )
    console = Console(stderr=True)

    async def measure() -> _Outcome:
        async with _open(subject, clock) as target:
            info = target.info
            limits = limits_of(
                info, max_batch_size=subject.max_batch_size, max_session_tokens=subject.max_session_tokens
            )
            state = load_state(samples, identity_of(info), limits)
            for line in _warnings(info, state):
                console.print(line, markup=False, highlight=False)
            with Bar(*columns, console=console, refresh_per_second=2) as bar:
                row = bar.add_task("warming up", total=None, left="")

                def show(progress: Progress) -> None:
                    left = (
                        f"{progress.settled}/{progress.points} points, {progress.elapsed_s:.0f} s so far, "
                        f"about {progress.remaining_s:.0f} s left"
                    )
                    bar.update(
                        row, description=progress.now, completed=progress.settled, total=progress.points, left=left
                    )

                profiler = Profiler(target, state, clock, effort, seed=seed, on_progress=show)
                stop, loop = asyncio.Event(), asyncio.get_running_loop()
                loop.add_signal_handler(signal.SIGINT, stop.set)
                try:
                    finished = await profiler.run(stop)
                finally:
                    loop.remove_signal_handler(signal.SIGINT)
                if finished:
                    done = len(profiler.points)
                    bar.update(row, description="measured", completed=done, total=done, left=f"{done} points")
                else:
                    bar.update(row, description="stopped")
            return _Outcome(info, profiler, state, finished)

    return run_event_loop(measure())


def _warnings(info: TargetInfo, state: ProfilerState) -> list[str]:
    lines = []
    if info.policy not in (None, _AT_ONCE):
        lines.append(
            f"the gateway's policy is {info.policy}, which may hold requests back or reorder them: "
            f"serve with --policy {_AT_ONCE} while it is measured"
        )
    if state.observations:
        lines.append(f"going on from {len(state.observations)} repeats in {state.elapsed_s:.0f} s of earlier runs")
    return lines


# -- telling --------------------------------------------------------------------------------------------------------


def _source(outcome: _Outcome) -> str:
    state = outcome.state
    return (
        f"measured by lmdeploy_slo {__version__} in {state.elapsed_s:.0f} s: "
        f"{len(state.observations)} repeats of {len(state.of_points())} points"
    )


def _settings(outcome: _Outcome, effort: Effort) -> Mapping[str, str]:
    limits = outcome.state.limits
    shown: dict[str, Any] = {
        **{key: value for key, value in outcome.state.target.items() if value},
        "measured up to": f"{limits.max_batch_size} sequences, {limits.max_session_tokens} tokens each",
        "precision": f"{100 * effort.precision:g} %",
        "budget": f"{effort.budget_s:g} s, {outcome.state.elapsed_s:.0f} s used",
        "version": __version__,
    }
    return {key: str(value) for key, value in shown.items()}


def remarks(
    state: ProfilerState, info: TargetInfo, measured: Measured, written: tuple[Path, Path, Path | None]
) -> list[str]:
    """What the table does not say: what could not be measured, and where things are."""
    lines = [f"{point}: not measured, {why}" for point, why in state.given_up.items()]
    widest, takes = measured.fitted.range.batch_size, state.limits.max_batch_size
    if widest is not None and widest[1] < takes:
        lines.append(f"batches of more than {widest[1]:.0f} were not measured, the engine takes {takes}")
    if measured.fitted.set_aside:
        lines.append(f"{len(measured.fitted.set_aside)} repeats were disturbed and set aside")
    if info.synthetic:
        lines.append("the engine is emulated: this is a profile of the emulation")
    profile, samples, page = written
    lines.append(f"profile {profile}, samples {samples}" + (f", page {page}" if page is not None else ""))
    if page is None and importlib.util.find_spec("matplotlib") is None:
        lines.append("a page needs matplotlib: pip install 'lmdeploy-slo[report]', then give the same command again")
    return lines
