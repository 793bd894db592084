"""The chart: it lints, refuses what it does not know, renders what is reviewed, and gives away no right in vain.

Golden renders: tests/helm/golden/NAME.yaml; after a change that is meant, `UPDATE_GOLDEN=1 make test-helm` and
look at the difference.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from csi_vduse import DRIVER_NAME, __version__, metrics
from csi_vduse.backends.file import parse_location
from csi_vduse.cli.main import main
from csi_vduse.config import parse_pools
from csi_vduse.kube.resources import NODES, SNAPSHOTS, VOLUMES
from csi_vduse.volumes import kubernetes_objects as objects
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState, State
from lab.dashboard import prometheus
from tests.unit.volumes.test_registry_directory import a_snapshot, a_volume

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/csi-vduse"
HERE = Path(__file__).parent
KUBERNETES = "1.36.0"
TIMEOUT_S = 300


@pytest.fixture(scope="session")
def helm() -> str:
    built = subprocess.run(
        [ROOT / "tools/build_helm.sh"], check=True, capture_output=True, text=True, timeout=1800
    )
    return built.stdout.strip()


def render(helm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        helm,
        "template",
        "vduse",
        str(CHART),
        "--namespace",
        "vduse-system",
        "--kube-version",
        KUBERNETES,
    ]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def rendered(helm: str, *arguments: str) -> list[dict]:
    done = render(helm, *arguments)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def of_kind(found: list[dict], kind: str) -> dict[str, dict]:
    return {each["metadata"]["name"]: each for each in found if each["kind"] == kind}


@pytest.fixture(scope="session")
def default(helm: str) -> list[dict]:
    return rendered(helm)


@pytest.fixture(scope="session")
def everything(helm: str) -> list[dict]:
    return rendered(helm, "--values", str(HERE / "values/everything.yaml"))


@pytest.mark.parametrize("arguments", [(), ("--values", str(HERE / "values/everything.yaml"))])
def test_it_lints(helm, arguments):
    command = [helm, "lint", "--strict", "--kube-version", KUBERNETES, str(CHART), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["default", "everything"])
def test_it_renders_what_was_reviewed(helm, name):
    values = HERE / f"values/{name}.yaml"
    done = render(helm, *(("--values", str(values)) if values.exists() else ()))
    assert done.returncode == 0, done.stderr
    golden = HERE / f"golden/{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(done.stdout)
    assert done.stdout == golden.read_text(), f"{golden} differs: look, then UPDATE_GOLDEN=1 make test-helm"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("unknown=1", "unknown"),
        ("image.tga=x", "tga"),
        ("image.digest=sha256:short", "digest"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("kubeletPath=relative", "kubeletPath"),
        ("pools[0].name=default,pools[0].kind=nfs,pools[0].path=/x", "kind"),
        ("pools[0].name=UPPER,pools[0].kind=file,pools[0].path=/x", "name"),
        ("sharedPools[0].name=far,sharedPools[0].kind=file,sharedPools[0].path=/x", "kind"),
        ("sharedPools[0].name=far,sharedPools[0].kind=nbd,sharedPools[0].address=x", "controllerSecret"),
        ("storageClasses[0].name=x,storageClasses[0].volumeBindingMode=Late", "volumeBindingMode"),
        ("controller.replicas=0", "replicas"),
        ("node.maxUnavailable=half", "maxUnavailable"),
        ("agent.resources.limit.memory=1Gi", "limit"),
        ("logging.level=LOUD", "level"),
        ("networkPolicy.apiServerPorts[0]=99999", "apiServerPorts"),
        ("monitoring.podMonitor.interval=often", "interval"),
        ("sidecars.registrar.image.repository=x", "registrar"),
    ],
)
def test_values_that_it_does_not_know_are_refused_by_name(helm, wrong, named):
    done = render(helm, "--set", wrong)
    assert done.returncode != 0
    assert named in done.stderr


def test_every_value_is_in_the_schema():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    for key, value in values.items():
        assert key in schema["properties"]
        for inner in value if isinstance(value, dict) else ():
            assert inner in schema["properties"][key]["properties"], f"{key}.{inner}"


def test_kubernetes_without_selectable_fields_is_refused(helm):
    done = render(helm, "--kube-version", "1.30.0")
    assert done.returncode != 0
    assert "1.31" in done.stderr


def test_default_values_need_no_foreign_custom_resources(default):
    foreign = {"monitoring.coreos.com", "snapshot.storage.k8s.io"}
    assert not [each for each in default if each["apiVersion"].split("/")[0] in foreign]


def test_selectors_hold_nothing_that_a_release_changes(default):
    for kind in ("Deployment", "DaemonSet"):
        for name, each in of_kind(default, kind).items():
            labels = each["spec"]["selector"]["matchLabels"]
            assert set(labels) == {f"app.kubernetes.io/{key}" for key in ("name", "instance", "component")}, (
                name
            )


def test_the_agent_is_upgraded_beside_the_old_one(default):
    agent = of_kind(default, "DaemonSet")["vduse-csi-vduse-agent"]["spec"]
    assert agent["updateStrategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    pod = agent["template"]["spec"]
    (container,) = pod["containers"]
    # A declared port would keep two agents of one node apart; a probe could kill the workers.
    assert "ports" not in container
    assert "livenessProbe" not in container
    assert "limits" not in container["resources"]
    assert pod["hostNetwork"]
    assert pod["hostPID"]
    assert pod["automountServiceAccountToken"] is False


def test_only_what_touches_devices_is_privileged(default):
    controller = of_kind(default, "Deployment")["vduse-csi-vduse-controller"]["spec"]["template"]["spec"]
    assert controller["securityContext"]["runAsNonRoot"]
    for container in controller["containers"]:
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}, container["name"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
    assert "volumeMounts" in controller["containers"][0]
    assert all("emptyDir" in volume for volume in controller["volumes"])
    node = of_kind(default, "DaemonSet")["vduse-csi-vduse-node"]["spec"]["template"]["spec"]
    assert "hostNetwork" not in node
    assert "hostPID" not in node


def test_the_node_plugin_may_write_statuses_only(default):
    rules = of_kind(default, "ClusterRole")["vduse-csi-vduse-node"]["rules"]
    writes = {
        (resource, verb)
        for rule in rules
        for resource in rule["resources"]
        for verb in rule["verbs"]
        if verb not in {"get", "list", "watch"}
    }
    assert writes == {
        ("vdusevolumes/status", "update"),
        ("vdusesnapshots/status", "update"),
        ("vdusenodes", "create"),
        ("vdusenodes/status", "update"),
        ("events", "create"),
        ("nodes", "patch"),
    }


def test_the_controller_may_write_statuses_where_pools_are_on_no_node(default, everything):
    for found, pools in ((default, False), (everything, True)):
        rules = of_kind(found, "ClusterRole")["vduse-csi-vduse-controller"]["rules"]
        assert any("vdusevolumes/status" in rule["resources"] for rule in rules) == pools


def test_certificates_are_where_the_pool_is_told_they_are(everything):
    controller = of_kind(everything, "Deployment")["vduse-csi-vduse-controller"]["spec"]["template"]["spec"]
    agent = of_kind(everything, "DaemonSet")["vduse-csi-vduse-agent"]["spec"]["template"]["spec"]
    place = "/etc/csi-vduse/pools/far.away"
    for pod, secret in ((controller, "orders"), (agent, "readers")):
        mounted = {each["mountPath"]: each["name"] for each in pod["containers"][0]["volumeMounts"]}
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert volumes[mounted[place]]["secret"]["secretName"] == secret
    assert (
        f"--pool=far.away=nbd:storage.example:7000?tls={place}&node-tls={place}"
        in (controller["containers"][0]["args"])
    )


def test_no_role_has_a_wildcard_or_secrets(everything):
    for kind in ("ClusterRole", "Role"):
        for name, role in of_kind(everything, kind).items():
            for rule in role["rules"]:
                assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"], name
                assert "secrets" not in rule["resources"], name


def test_digests_go_before_tags(everything):
    deployment = of_kind(everything, "Deployment")["vduse-csi-vduse-controller"]["spec"]["template"]["spec"]
    images = {container["name"]: container["image"] for container in deployment["containers"]}
    assert images["controller"].endswith(
        "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
    )
    assert "@sha256:fedcba98" in images["csi-provisioner"]
    assert images["csi-attacher"].endswith("csi-attacher:v4.12.0")


def test_port_names_are_short_enough_and_differ(everything):
    for kind in ("Deployment", "DaemonSet"):
        for each in of_kind(everything, kind).values():
            ports = [p for c in each["spec"]["template"]["spec"]["containers"] for p in c.get("ports", ())]
            assert all(len(port["name"]) <= 15 for port in ports)
            assert len({port["containerPort"] for port in ports}) == len(ports)


@pytest.mark.parametrize("fixture", ["default", "everything"])
def test_every_command_line_is_one_that_the_program_knows(fixture, request, monkeypatch, capsys):
    """Parse the arguments of our own containers with our own parser, and stop before anything runs."""
    found = request.getfixturevalue(fixture)
    ran = []
    for module in ("controller", "node"):
        monkeypatch.setattr(f"csi_vduse.cli.{module}.run", lambda options: ran.append(options.command) or 0)
    for kind in ("Deployment", "DaemonSet"):
        for each in of_kind(found, kind).values():
            container = each["spec"]["template"]["spec"]["containers"][0]
            if container["name"] in {"controller", "node"}:
                arguments = [text.replace("$(NODE_NAME)", "n1") for text in container["args"]]
                assert main(arguments) == 0, capsys.readouterr().err
    assert sorted(ran) == ["controller", "node"]


def test_a_pool_may_allow_long_holds(helm):
    found = rendered(
        helm, "--set", "pools[0].name=a,pools[0].kind=file,pools[0].path=/a,pools[0].maxHoldSeconds=120"
    )
    (arguments,) = (
        each["spec"]["template"]["spec"]["containers"][0]["args"]
        for name, each in of_kind(found, "DaemonSet").items()
        if name.endswith("node")
    )
    (pool,) = parse_pools([text.removeprefix("--pool=") for text in arguments if text.startswith("--pool=")])
    assert parse_location(pool.location).max_hold_s == 120


def crd(found: list[dict], plural: str) -> dict:
    return of_kind(found, "CustomResourceDefinition")[f"{plural}.csi.vduse.dev"]["spec"]


def schema_of(found: list[dict], plural: str) -> dict:
    return crd(found, plural)["versions"][0]["schema"]["openAPIV3Schema"]


def conforms(value, schema, path="") -> None:
    """Check as the API server does, as far as our schemas go; unknown fields would be dropped silently."""
    if value is None:
        assert schema.get("nullable"), f"{path} is null"
        return
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    assert isinstance(value, kinds[schema["type"]]), f"{path}: {value!r} is no {schema['type']}"
    if "enum" in schema:
        assert value in schema["enum"], f"{path}: {value!r}"
    if schema["type"] == "object":
        assert set(schema.get("required", ())) <= set(value), path
        for key, inner in value.items():
            assert key in schema.get("properties", {}), f"{path}.{key} would be dropped"
            conforms(inner, schema["properties"][key], f"{path}.{key}")
    if schema["type"] == "array":
        for inner in value:
            conforms(inner, schema["items"], f"{path}[]")


def test_what_we_write_is_what_the_custom_resources_hold(default):
    begun = FilesystemRecord("ext4", FilesystemState.FORMATTING, "11111111-1111-4111-8111-111111111111")
    bare = a_volume(source=None, filesystem=None, state=State.CREATING)
    for volume in (a_volume(node="n1"), bare, a_volume(filesystem=begun)):
        written = objects.volume_object(volume)
        schema = schema_of(default, "vdusevolumes")["properties"]
        conforms(written["spec"], schema["spec"], "spec")
        conforms(objects.volume_status(volume, {}), schema["status"], "status")
    snapshot = a_snapshot()
    schema = schema_of(default, "vdusesnapshots")["properties"]
    conforms(objects.snapshot_object(snapshot)["spec"], schema["spec"], "spec")
    conforms(objects.snapshot_status(snapshot, {}), schema["status"], "status")
    error = objects.error_status(objects.DataLoss("x"), 1, retrying=True)
    conforms(error, schema["status"]["properties"]["error"], "error")


def test_custom_resources_are_those_that_the_program_uses(default):
    for resource in (VOLUMES, SNAPSHOTS, NODES):
        plural = resource.base.rpartition("/")[2]
        spec = crd(default, plural)
        assert spec["names"]["kind"] == resource.kind
        assert spec["scope"] == "Cluster"
        assert "status" in spec["versions"][0]["subresources"]
    for plural in ("vdusevolumes", "vdusesnapshots"):
        assert crd(default, plural)["versions"][0]["selectableFields"] == [{"jsonPath": ".spec.nodeName"}]


def test_custom_resources_stay_when_the_release_goes(default):
    for name, each in of_kind(default, "CustomResourceDefinition").items():
        assert each["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep", name


def test_chart_and_program_have_one_name_and_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert DRIVER_NAME in (CHART / "templates/_helpers.tpl").read_text()


def known_metrics() -> set[str]:
    """Names in the source: counters there lack the suffix that Prometheus shows."""
    return set(re.findall(r'"(csi_vduse_\w+)"', Path(metrics.__file__).read_text()))


@pytest.mark.parametrize("file", ["alerts.yaml", "dashboards/csi-vduse.json"])
def test_alerts_and_dashboard_ask_for_metrics_that_exist(file):
    used = set(re.findall(r"csi_vduse_\w+", (CHART / file).read_text()))
    known = known_metrics()
    for name in used:
        base = re.sub(r"_(total|bucket|sum|count|info)$", "", name)
        assert name in known or base in known, name


def test_the_lab_scrapes_what_the_pod_monitor_names(everything):
    (monitor,) = of_kind(everything, "PodMonitor").values()
    (components,) = monitor["spec"]["selector"]["matchExpressions"]
    assert set(components["values"]) == set(prometheus.COMPONENTS)
    assert all(prometheus.PORTS.fullmatch(each["port"]) for each in monitor["spec"]["podMetricsEndpoints"])


def test_every_alert_has_a_runbook_that_exists():
    titles = re.findall(r"^## (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}
    for group in yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            file, _, anchor = rule["annotations"]["runbook"].partition("#")
            assert (file, anchor in anchors) == ("docs/troubleshooting.md", True), rule["alert"]
