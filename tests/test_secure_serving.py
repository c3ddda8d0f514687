"""`serve` with certificates, tokens and policies as a process, and the commands that call it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority, ServerFiles, new_authority, replace
from serve_process import serve

from lmdeploy_slo.client import NO_RETRY, Client, tls_credentials
from lmdeploy_slo.client.channel import Access
from lmdeploy_slo.errors import ConfigError, RateLimited, RequestError, Unauthenticated
from lmdeploy_slo.gateway.tokens import new_token

COMMAND = [sys.executable, "-m", "lmdeploy_slo"]


def run(*arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": "/usr/bin:/bin", **({} if token is None else {"LMDEPLOY_SLO_TOKEN": token})}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=60, env=environ)


class Secured:
    """A serving process with everything on, and what a client needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority: Authority = new_authority()
        files = ServerFiles(folder, self.authority, clients_of=self.authority).files
        chain, key = self.authority.issue("client.test", common_name="machine")
        for name, content in (("ca.pem", self.authority.ca), ("client.pem", chain), ("client.key", key)):
            replace(folder / name, content)
        self.tokens = folder / "tokens"
        self.policy = folder / "clients.toml"
        self.policy.write_text("")
        self.alice = self.new_token("alice")
        self.flags = [
            *("--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-client-ca", str(files.client_ca)),
            *("--tokens-file", str(self.tokens), "--client-policy", str(self.policy)),
        ]
        self.address = ""

    def new_token(self, name: str) -> str:
        made = run("token", "new", name, "--file", str(self.tokens))
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    @property
    def tls_flags(self) -> list[str]:
        at = self.folder
        return ["--ca", str(at / "ca.pem"), "--cert", str(at / "client.pem"), "--key", str(at / "client.key")]

    def client(self, token: str | None) -> Client:
        at = self.folder
        credentials = tls_credentials(at / "ca.pem", at / "client.pem", at / "client.key")
        return Client(self.address, credentials=credentials, token=token)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Secured, subprocess.Popen[str]]]:
    everything = Secured(tmp_path_factory.mktemp("secured"))
    with serve(everything.folder, "--policy", "fcfs", *everything.flags) as (address, process):
        everything.address = f"localhost:{address.rpartition(':')[2]}"
        yield everything, process


def test_who_shows_everything_is_served(secured: tuple[Secured, subprocess.Popen[str]]) -> None:
    server, _ = secured
    with server.client(server.alice) as client:
        assert client.generate("Hello", max_new_tokens=3, ignore_eos=True).completion.usage.output_tokens == 3
    with server.client("slo_wrong") as client, pytest.raises(Unauthenticated):
        client.load()


def test_commands_show_who_calls(secured: tuple[Secured, subprocess.Popen[str]], tmp_path: Path) -> None:
    server, _ = secured
    at = ["--target", server.address, *server.tls_flags]
    answer = run("generate", "-p", "Hello", "--max-new-tokens", "3", "--json", *at, token=server.alice)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["completion"]["usage"]["output_tokens"] == 3
    refused = run("generate", "-p", "Hello", *at)
    assert refused.returncode == 1
    assert refused.stderr.startswith("lmdeploy_slo: UNAUTHENTICATED: a valid bearer token is needed")
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens,task_class\n0,10,3,chat\n0.01,10,3,chat\n")
    replayed = run("replay", str(trace), "--json", str(tmp_path / "out.json"), *at, "--token", server.alice)
    assert replayed.returncode == 0, replayed.stderr
    assert json.loads((tmp_path / "out.json").read_text())["runs"][0]["finished"] == 2


def test_sighup_has_policies_read_again_and_keeps_them_where_they_are_broken(
    secured: tuple[Secured, subprocess.Popen[str]],
) -> None:
    server, process = secured

    def rate_limited() -> bool:
        with server.client(server.alice) as client:
            try:
                for _ in range(2):
                    client.generate("Hello", max_new_tokens=9, ignore_eos=True, timeout_s=5)
            except RateLimited:
                return True
            return False

    assert not rate_limited()
    for text in ("[clients.alice]\ntokens_per_s = 0.001\nburst_tokens = 1", "[clients.alice"):
        server.policy.write_text(text)
        process.send_signal(signal.SIGHUP)
        with server.client(server.alice) as client:
            client.load()  # by now the signal has been handled
        assert rate_limited()


def test_what_cannot_be_used_is_no_start(tmp_path: Path) -> None:
    authority = new_authority()
    files = ServerFiles(tmp_path, authority).files
    replace(files.key, authority.issue("localhost")[1])
    pair = ["--tls-cert", str(files.cert), "--tls-key", str(files.key)]
    for arguments, expected in (
        (pair, "are no certificate and its key"),
        (["--tls-cert", str(files.cert)], "tls_cert and tls_key are set together or not at all"),
        (["--tokens-file", str(tmp_path / "none")], "No such file or directory"),
        (["--client-policy", str(files.key)], "not TOML"),
        (["--host", "0.0.0.0"], "others can reach 0.0.0.0"),
    ):
        refused = run("serve", "--port", "0", "--policy", "fcfs", *arguments)
        assert refused.returncode == 2
        assert expected in refused.stderr
        assert "Traceback" not in refused.stderr


# -- tokens and plain text ----------------------------------------------------


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/run/x", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv6:[::1]:1", True),
        ("10.0.0.1:1", False),
        ("gateway.example:1", False),
        ("localhost.example:1", False),
        ("dns:///10.0.0.1:1", False),
        ("[::2]:1", False),
    ],
)
def test_a_token_goes_in_plain_text_to_this_machine_alone(target: str, local: bool) -> None:
    plain = Access(token="slo_x")
    if local:
        assert plain.metadata_for(target) == (("authorization", "Bearer slo_x"),)
    else:
        with pytest.raises(ConfigError, match="in plain text"):
            plain.metadata_for(target)
        with pytest.raises(ConfigError, match="in plain text"):
            Client(target, token="slo_x")
    for protected in (Access(tls_credentials(), "slo_x"), Access(None, "slo_x", insecure=True)):
        assert protected.metadata_for(target) == (("authorization", "Bearer slo_x"),)


def test_what_is_no_token_is_not_sent() -> None:
    for text in ("a\nb", "ä"):
        with pytest.raises(ConfigError, match="not printable ASCII"):
            Access(token=text).metadata_for("localhost:1")


def test_a_client_certificate_comes_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="together or not at all"):
        tls_credentials(cert=tmp_path / "c.pem")
    with pytest.raises(ConfigError, match="No such file"):
        tls_credentials(ca=tmp_path / "c.pem")


# -- what is not written down -------------------------------------------------

CANARY = "plover-4711"


def test_no_prompt_and_no_token_is_in_the_log_or_the_metrics(tmp_path: Path) -> None:
    token, line = new_token("alice")
    (tmp_path / "tokens").write_text(line)
    flags = ["--policy", "fcfs", "--tokens-file", str(tmp_path / "tokens"), "--metrics-port", "0", "--port", "0"]
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*COMMAND, "serve", *flags, "--log-level", "debug", "--log-requests"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        ready = re.fullmatch(r"lmdeploy_slo: serving on (\S+) \(.*; metrics on (\S+)\)\n", process.stdout.readline())
        assert ready is not None
        with Client(ready[1], token=token, retry=NO_RETRY) as client:
            client.generate(CANARY, max_new_tokens=2, ignore_eos=True, request_id="one")
            client.generate([{"role": "user", "content": CANARY}], max_new_tokens=2, ignore_eos=True)
            assert client.predict(CANARY, e2e_ms=1).would_meet_slo is False
            for wrong in ({"temperature": 9.0}, {"model": "none"}, {"stop": [CANARY] * 99}, {"queue_timeout_ms": 0.0}):
                with pytest.raises(RequestError) as refusal:
                    client.generate(CANARY, **wrong)
                assert CANARY not in str(refusal.value)
            stream = client.stream(CANARY, max_new_tokens=100_000, ignore_eos=True)
            next(stream)
            stream.close()
        with Client(ready[1], token=f"{token}x") as stranger, pytest.raises(Unauthenticated):
            stranger.generate(CANARY)
        metrics = urllib.request.urlopen(f"http://{ready[2]}/metrics", timeout=10).read().decode()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    written = log.read_text()
    assert "one" in written, "requests are logged"
    assert "requests_rejected_total" in metrics
    for text in (written, metrics):
        assert CANARY not in text
        assert token not in text
        assert token[15:] not in text
