"""The Kubernetes manifests hang together: labels, secrets, versions, who may reach whom."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
CLUSTER = {"rayVersion", "headGroupSpec", "workerGroupSpecs", "authOptions", "enableInTreeAutoscaling"}
HEAD = {"serviceType", "rayStartParams", "template"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "idleTimeoutSeconds"}
"""Of KubeRay's RayCluster, those of its fields that are used here or may be."""


def documents() -> Iterator[dict[str, Any]]:
    for name in yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]:
        yield from yaml.safe_load_all((FOLDER / name).read_text())


def pods() -> Iterator[dict[str, Any]]:
    """Every pod template."""
    for document in documents():
        spec = document.get("spec", {})
        if document["kind"] == "RayCluster":
            yield spec["headGroupSpec"]["template"]
            yield from (group["template"] for group in spec["workerGroupSpecs"])
        elif "template" in spec:
            yield spec["template"]


def of(kind: str) -> list[dict[str, Any]]:
    return [document for document in documents() if document["kind"] == kind]


def test_each_pod_can_do_little() -> None:
    for pod in pods():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in pod["spec"]["containers"]:
            closed = container["securityContext"]
            assert closed["allowPrivilegeEscalation"] is False and closed["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert "livenessProbe" in container


def test_secrets_are_only_referred_to() -> None:
    assert not of("Secret")
    named = set()
    for pod in pods():
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                if re.search("PASSWORD|TOKEN$|KEY", variable["name"]):
                    named.add(variable["valueFrom"]["secretKeyRef"]["name"])
            named |= {part["secretRef"]["name"] for part in container.get("envFrom", []) if "secretRef" in part}
    made = set(re.findall(r"create secret generic (\S+)", (ROOT / "docs/multi-node.md").read_text()))
    assert named == made == {"interpose", "interpose-environment"}


def test_policies_let_in_only_who_is_there() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods()]
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of("NetworkPolicy")}
    assert policies.pop("closed") == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for spec in policies.values():
        assert spec["podSelector"]["matchLabels"] in labels
        for peer in (peer for rule in spec["ingress"] for peer in rule["from"]):
            assert "ipBlock" not in peer and peer
            assert "podSelector" not in peer or peer["podSelector"]["matchLabels"] in labels
    reach = [peer.get("podSelector", {}).get("matchLabels") for peer in policies["ray"]["ingress"][0]["from"]]
    assert reach == [{"app.kubernetes.io/name": "ray"}, None], "Ray is reached by Ray and by the operator"


def test_services_and_sets_select_their_pods() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods()]
    for service in of("Service"):
        assert service["spec"]["selector"] in labels
    for kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
        for document in of(kind):
            assert document["spec"]["selector"]["matchLabels"] in labels


def test_the_ray_cluster_is_of_kuberays_fields_and_of_our_ray() -> None:
    (cluster,) = of("RayCluster")
    spec = cluster["spec"]
    assert spec.keys() <= CLUSTER and spec["headGroupSpec"].keys() <= HEAD
    assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    for group in spec["workerGroupSpecs"]:
        assert group.keys() <= GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for params in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in params["rayStartParams"].values())


def test_the_ingress_shows_no_figures() -> None:
    (ingress,) = of("Ingress")
    paths = [(path["path"], path["pathType"]) for path in ingress["spec"]["rules"][0]["http"]["paths"]]
    assert ("/", "Exact") in paths and ("/v1", "Prefix") in paths
    assert not any("metrics" in path or (path == "/" and kind != "Exact") for path, kind in paths)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_kubectl_puts_it_together() -> None:
    done = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, check=True)
    made = list(yaml.safe_load_all(done.stdout))
    assert {document["kind"] for document in made} > {"RayCluster", "Deployment", "StatefulSet", "ConfigMap"}
    assert "image: interpose-" not in done.stdout, "an image that the kustomization doesn't name"
    assert all(document["metadata"]["namespace"] == "interpose" for document in made)
