"""The deployment examples agree with the server and with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmdeploy_slo.config import Config, load
from lmdeploy_slo.core.request import ClientId, PriorityClass
from lmdeploy_slo.gateway.policy_file import read_policies
from lmdeploy_slo.gateway.server import FLUSH_S, LIVENESS

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"


@pytest.fixture(scope="module")
def config() -> Config:
    return load(DEPLOY / "server.toml", environ={})


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    assert [d["kind"] for d in documents] == ["Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"]
    spec: dict[str, Any] = documents[0]["spec"]["template"]["spec"]
    return spec


def test_the_configuration_is_one_for_strangers(config: Config) -> None:
    assert config.security.missing_for_strangers == []
    assert not config.security.insecure
    assert config.limits.queue_share is not None


def test_the_policies_can_be_read() -> None:
    policies = read_policies(DEPLOY / "clients.toml")
    assert policies.of(ClientId("frontend")).names_users
    assert policies.of(ClientId("nightly")).classes == {PriorityClass.BULK}
    assert policies.of(ClientId("ops")).operator


def test_the_pod_listens_where_the_configuration_says(config: Config, pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "grpc": config.server.port,
        "health": config.server.health_port,
        "metrics": config.observability.metrics_port,
    }
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == config.server.health_port
    assert container["livenessProbe"]["grpc"]["service"] == LIVENESS
    assert "service" not in container["readinessProbe"]["grpc"]


def test_every_file_of_the_configuration_is_mounted(config: Config, pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    (projected,) = (volume["projected"]["sources"] for volume in pod["volumes"] if volume["name"] == "config")
    items = {item["path"] for source in projected for item in source.get("secret", {}).get("items", ())}
    security = config.security
    for path in (security.tls_cert, security.tls_key, security.tokens_file):
        assert path is not None
        assert str(path.relative_to("/etc/lmdeploy_slo")) in items
    assert security.client_policy == Path("/etc/lmdeploy_slo/clients.toml")
    assert {"/etc/lmdeploy_slo", "/models", "/var/lib/lmdeploy_slo", "/tmp"} <= mounts
    assert not any("subPath" in mount for mount in container["volumeMounts"])
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_who_kills_waits_longer_than_who_drains(config: Config, pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + config.server.drain_grace_s + FLUSH_S
    unit = (DEPLOY / "lmdeploy_slo.service").read_text(encoding="utf-8")
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop is not None
    assert int(stop[1]) > config.server.drain_grace_s + FLUSH_S
    assert "ExecReload=/bin/kill -HUP $MAINPID" in unit


def test_nothing_runs_as_root(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    image = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    assert f"--uid {pod['securityContext']['runAsUser']}" in image
    assert image.index("USER 10001") < image.index("ENTRYPOINT")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit() -> None:
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(DEPLOY / "lmdeploy_slo.service")], capture_output=True, text=True, check=False
    )
    wrong = [line for line in verified.stderr.splitlines() if "lmdeploy_slo.service" in line]
    assert [line for line in wrong if "is not executable" not in line] == []
