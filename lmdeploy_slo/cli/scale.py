"""`lmdeploy_slo scale`: more engines, or fewer, while the server serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from lmdeploy_slo.cli import connection
from lmdeploy_slo.cli.generate import check_target, describe_error
from lmdeploy_slo.client import Client, Load
from lmdeploy_slo.clock import Clock, MonotonicClock
from lmdeploy_slo.errors import SloError

LOOK_S = 0.5


def scale(
    replicas: Annotated[int, typer.Argument(min=1, max=1024, help="Engines there shall be.")],
    target: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The server.", callback=check_target)
    ] = "127.0.0.1:50051",
    drain: Annotated[
        list[str] | None,
        typer.Option(metavar="INSTANCE", help="Take this engine away, and put another one in its place; repeatable."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it is so.")] = True,
    timeout_s: Annotated[float, typer.Option(min=0, help="Wait no longer; status 1 then.")] = 1800.0,
    tls: connection.Tls = False,
    ca: connection.Ca = None,
    cert: connection.Cert = None,
    key: connection.Key = None,
    token: connection.Token = None,
    insecure: connection.Insecure = False,
) -> None:
    """Have a server that runs its engines on Ray run so many of them.

    New engines take requests when they are up. Those that go take no more: who waits there moves to another one, and
    what runs there may end. Nothing is lost either way.
    """
    try:
        how = connection.access(tls=tls, ca=ca, cert=cert, key=key, token=token, insecure=insecure)
        with Client(target, credentials=how.credentials, token=how.token, insecure=how.insecure) as client:
            client.scale(replicas, drain=drain or ())
            if wait and not reached(client.load, replicas, timeout_s, gone=drain or ()):
                typer.echo(f"lmdeploy_slo: not done within {timeout_s:g} s; it goes on", err=True)
                raise typer.Exit(1)
            for replica in client.load().replicas:
                state = "draining" if replica.draining else "up" if replica.up else "down"
                typer.echo(f"{replica.instance}  {state}  {replica.in_flight} running, {replica.waiting} waiting")
    except SloError as error:
        typer.echo(f"lmdeploy_slo: {describe_error(error, target)}", err=True)
        raise typer.Exit(1) from None


def reached(
    look: Callable[[], Load],
    replicas: int,
    timeout_s: float,
    *,
    gone: Sequence[str] = (),
    sleep: Callable[[float], None] = time.sleep,
    clock: Clock | None = None,
) -> bool:
    """Whether, within `timeout_s` seconds, there are so many engines, all of them up, and none of those named."""
    clock = clock or MonotonicClock()
    until_s = clock.now_s() + timeout_s
    while True:
        seen = look().replicas
        stays = all(one.up and not one.draining and one.instance not in gone for one in seen)
        if len(seen) == replicas and stays:
            return True
        if clock.now_s() >= until_s:
            return False
        sleep(LOOK_S)
