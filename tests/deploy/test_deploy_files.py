"""What an operator deploys hangs together: compose files, their environment, images, figures, the guide."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from interpose_server.metrics import Metrics
from interpose_server.models.spec import ClusterConfig
from interpose_server.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = [ROOT / "docker-compose.yml", *sorted(DEPLOY.glob("compose.*.yml"))]
SECRETS = ("REDIS_PASSWORD", "RAY_AUTH_TOKEN", "GRAFANA_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY")


class Tagged(yaml.SafeLoader):
    """Compose's own tags, as the values they stand before."""


for tag in ("!reset", "!override"):
    Tagged.add_constructor(tag, lambda loader, node: loader.construct_sequence(node))


def load(path: Path) -> Any:
    return yaml.load(path.read_text(), Tagged)


def services() -> dict[str, Any]:
    found: dict[str, Any] = load(ROOT / "docker-compose.yml")["services"]
    return found


def variables(path: Path) -> Iterator[tuple[str, str]]:
    """Each variable that a compose file reads, with what stands behind its name."""
    yield from re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)([^}]*)\}", path.read_text())


def example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (str(key), *strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    else:
        yield str(value)


# Environment and secrets


def test_the_example_names_every_variable_and_no_other() -> None:
    read = {name for path in COMPOSE for name, _ in variables(path)}
    optional = {name for name in read if name.endswith("_IMAGE")} | {"NODE_IP", "HEAD_IP"}
    assert set(example()) - {"COMPOSE_PROFILES"} == read - optional


def test_nothing_secret_has_a_default() -> None:
    assert all(example()[name] == "" for name in SECRETS)
    for path in COMPOSE:
        for name, default in variables(path):
            if name in SECRETS:
                assert default.startswith(":?") or default == ":-", (path.name, name, default)
    # The store's keys may be missing where there is no store.
    assert ":-" not in {d for n, d in variables(ROOT / "docker-compose.yml") if n in SECRETS[:3]}


def test_new_secrets_are_made_once(tmp_path: Path) -> None:
    path, other = tmp_path / "env", tmp_path / "other"
    for target in (path, other):
        subprocess.run([DEPLOY / "new-env", "lab.example.org", target], check=True, capture_output=True)
    made = dict(line.split("=", 1) for line in path.read_text().splitlines() if line and line[0] != "#")
    assert made["DOMAIN"] == "lab.example.org" and made.keys() == example().keys()
    assert all(len(made[name]) == 64 for name in SECRETS)
    assert len({made[name] for name in SECRETS}) == len(SECRETS)
    assert made["REDIS_PASSWORD"] not in other.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = subprocess.run([DEPLOY / "new-env", "x", path], capture_output=True, text=True)
    assert again.returncode == 1 and "exists" in again.stderr


def test_settings_that_are_set_exist() -> None:
    texts = [*COMPOSE, *DEPLOY.rglob("*.y*ml"), ROOT / "Dockerfile", *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    for path in texts:
        for name in re.findall(rf"{PREFIX}([A-Z0-9_]*[A-Z0-9])", path.read_text()):
            assert name.lower() in Settings.model_fields, f"{path.name}: {PREFIX}{name}"


# The compose file


@pytest.mark.parametrize("name", services())
def test_each_container_can_do_little(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert not service.get("privileged") and "docker.sock" not in json.dumps(service)
    assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "proxy" else [])


@pytest.mark.parametrize("name", services())
def test_each_container_says_how_it_is_and_who_it_runs_as(name: str) -> None:
    service = services()[name]
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    # Ours say who in the Dockerfile, Grafana's image does; the proxy binds low ports.
    own = "build" in service or name in ("grafana", "proxy")
    assert own or not service["user"].startswith("0")


def test_the_stores_other_parts_are_heard_by_nobody() -> None:
    command = services()["store"]["command"]
    assert {"-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0", "-s3.iam=false"} < set(command)


def test_one_node_alone_counts_the_gpus() -> None:
    reserving = [name for name, service in services().items() if "devices" in json.dumps(service.get("deploy", {}))]
    assert reserving == ["ray-head"]


def test_only_the_proxy_is_reached_from_outside() -> None:
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert published.keys() == {"proxy", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in published["grafana"])
    networks = load(ROOT / "docker-compose.yml")["networks"]
    assert networks["inside"] == networks["figures"] == {"internal": True}
    inside = {name for name, service in services().items() if "inside" in service["networks"]}
    assert inside == {"redis", "gateway", "ray-head", "worker", "store"}
    assert services()["redis"]["networks"] == ["inside"] and services()["proxy"]["networks"] == ["edge"]


def test_who_is_waited_for_says_when_it_is_healthy() -> None:
    for service in services().values():
        needed = service.get("depends_on", {})
        for name in needed if isinstance(needed, dict) else ():
            assert needed[name] == {"condition": "service_healthy"}
            assert "healthcheck" in services()[name], name


def test_images_that_are_built_are_in_the_dockerfile() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\S+)", text, re.M)
    for service in services().values():
        if "build" in service:
            target = service["build"]["target"]
            assert target in stages
            assert service["image"] == f"${{IMAGES:-localhost}}/interpose-{target}:${{VERSION:-latest}}"
    assert text.count("USER 10001:10001") == 3
    for source in re.findall(r"^COPY (?:--chmod=\d+ )?(?!--from)(.+)$", text, re.M):
        for part in source.split()[:-1]:
            assert f"!{part}" in (ROOT / ".dockerignore").read_text(), part


def test_files_that_are_mounted_exist() -> None:
    for path in COMPOSE[:1]:
        for service in load(path)["services"].values():
            for volume in service.get("volumes", []):
                source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
                if source.startswith("./") and source != "./models":
                    assert (ROOT / source).exists(), source


def test_the_proxy_hides_figures_and_holds_nothing_back() -> None:
    text = (DEPLOY / "proxy" / "Caddyfile").read_text()
    assert "path /metrics\n\trespond @inside 404" in text
    assert "reverse_proxy gateway:8000" in text and "flush_interval -1" in text
    assert "timeout 0" not in text and "read_timeout" not in text


# Figures


def exported() -> set[str]:
    """Names under which figures are scraped, those without any value yet among them."""
    names = set()
    for family in Metrics().registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


def queries() -> Iterator[str]:
    board = json.loads((DEPLOY / "monitoring/grafana/interpose.json").read_text())
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield board["templating"]["list"][0]["query"]["query"]
    for group in yaml.safe_load((DEPLOY / "monitoring/alerts.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def test_what_is_drawn_and_alarmed_of_exists() -> None:
    asked = {name for query in queries() for name in re.findall(r"\binterpose_\w+", query)}
    assert len(asked) > 15
    assert asked <= exported()


def test_what_every_gateway_tells_is_not_added_up() -> None:
    """Two gateways tell the same of a model: only their own figures may be summed."""
    metrics = Metrics()
    own = [metrics.requests, metrics.seconds, metrics.jobs, metrics.tokens, metrics.streams, metrics.downloads]
    own += [metrics.sent, metrics.broker, metrics.storage]
    names = tuple(family.name for figure in own for family in figure.collect())
    for query in (query for query in queries() if "label_values" not in query):
        for found in re.finditer(r"\binterpose_\w+", query):
            before = query[: found.start()].removesuffix("rate(").removesuffix("increase(")
            if not found[0].startswith(names):
                assert re.search(r"max( by \([a-z, ]+\) )?\($", before), query


def test_prometheus_asks_the_gateway() -> None:
    (job,) = yaml.safe_load((DEPLOY / "monitoring/prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["gateway:8000"]}]
    assert '"--port", "8000"' in (ROOT / "Dockerfile").read_text()
    assert set(services()["prometheus"]["networks"]) & set(services()["gateway"]["networks"])
    source = yaml.safe_load((DEPLOY / "monitoring/grafana/datasources.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    board = (DEPLOY / "monitoring/grafana/interpose.json").read_text()
    assert set(re.findall(r'"uid": "(\w+)"', board)) == {source["uid"], "interpose"}


# Models


@pytest.mark.parametrize("path", [DEPLOY / "interpose.yaml", DEPLOY / "kubernetes/interpose.yaml"], ids=str)
def test_clusters_files_are_read(path: Path) -> None:
    config = ClusterConfig.read(path)
    assert config.ray == "auto" and config.gateway is False
    assert config.redis_url is None, "it would hold a password"


def test_the_guides_file_is_read_and_its_services_exist(tmp_path: Path) -> None:
    text = (ROOT / "docs/operating.md").read_text()
    (tmp_path / "interpose.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)[0])
    assert len(ClusterConfig.read(tmp_path / "interpose.yaml").models) == 3
    assert set(re.findall(r"docker compose (?:exec|logs|cp) (?:-T )?([a-z-]+)", text)) <= services().keys()
    for script in re.findall(r"^deploy/([a-z-]+)", text, re.M):
        assert (DEPLOY / script).stat().st_mode & stat.S_IXUSR, script
