"""What the cluster lab writes down before anything runs: commands, configurations, kubeconfigs."""

import json
from pathlib import Path

import pytest

from lab.cluster import access, kubernetes, network
from lab.cluster.control_plane import programs
from lab.cluster.layout import API_SERVICE, Layout
from lab.cluster.node import configuration
from lab.errors import LabSetupError


@pytest.fixture
def layout(tmp_path, monkeypatch):
    monkeypatch.setenv("CSI_VDUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LAB_RESULTS", str(tmp_path / "results"))
    return Layout("test", 2)


def test_two_clusters_share_no_name():
    one, other = Layout("a"), Layout("b")

    def names(layout):
        return {layout.namespace, layout.folder, layout.logs, *(node.machine for node in layout.nodes)}

    assert not names(one) & names(other)


def test_everything_of_the_network_but_the_namespace_is_made_inside_it(layout):
    first, *others = network.commands(layout)

    assert first == ["ip", "netns", "add", "csi-vduse-test"]
    assert all(command[:2] == ["nsenter", "--net=/run/netns/csi-vduse-test"] for command in others)


def test_the_network_routes_each_nodes_pods_to_that_node(layout):
    routes = [command[-4:] for command in network.commands(layout) if "route" in command]

    assert routes == [
        ["add", "10.201.1.0/24", "via", "10.200.0.11"],
        ["add", "10.201.2.0/24", "via", "10.200.0.12"],
    ]


def test_the_api_server_answers_at_the_address_of_its_service(layout):
    served = {i.file: i.addresses for i in access.identities(layout)}

    assert API_SERVICE in served["apiserver"]
    assert any(f"{API_SERVICE}/32" in command for command in network.commands(layout))
    assert "--secure-port=443" in programs(layout)["kube-apiserver"]


def test_programs_start_in_the_order_in_which_they_need_each_other(layout):
    assert list(programs(layout))[:2] == ["etcd", "kube-apiserver"]


def test_no_two_programs_can_be_taken_for_each_other(layout):
    argvs = [tuple(argv) for argv in programs(layout).values()]

    assert len(set(argvs)) == len(argvs)


def test_every_node_has_an_identity_that_the_node_authorizer_knows(layout):
    nodes = {i.file: (i.name, i.group) for i in access.identities(layout) if i.group == "system:nodes"}

    assert nodes == {
        "node-1": ("system:node:node-1", "system:nodes"),
        "node-2": ("system:node:node-2", "system:nodes"),
    }


def test_laying_access_makes_a_kubeconfig_for_every_client_and_none_for_the_server(layout):
    access.lay(layout, Path("/built/kube"), Path("/built/helm"))

    made = {path.stem for path in layout.folder.glob("*.kubeconfig")}
    assert made == {i.file for i in access.identities(layout)} - {"apiserver"}
    config = json.loads((layout.folder / "admin.kubeconfig").read_text())
    user, cluster = config["users"][0]["user"], config["clusters"][0]["cluster"]
    files = (user["client-certificate"], user["client-key"], cluster["certificate-authority"])
    assert all(Path(file).is_file() for file in files)


def test_kubectl_runs_inside_the_clusters_network(layout):
    access.lay(layout, Path("/built/kube"), Path("/built/helm"))

    script = layout.kubectl.read_text()
    assert "nsenter --net=/run/netns/csi-vduse-test -- /built/kube kubectl" in script
    assert layout.kubectl.stat().st_mode & 0o111


def test_a_node_knows_the_way_to_the_other_nodes_pods_but_not_to_its_own(layout):
    text = configuration(layout, layout.nodes[0], Path("/built/kube"))

    assert "peers=10.201.2.0/24=10.200.0.12\n" in text
    assert "pods=10.201.1.0/24\n" in text


def test_a_sidecars_tag_is_the_version_that_go_mod_pins():
    go_mod = (kubernetes.MODULE / "go.mod").read_text()

    assert kubernetes.sidecar_image("csi-provisioner", go_mod) == (
        "registry.k8s.io/sig-storage/csi-provisioner:v6.3.0"
    )


def test_a_sidecar_that_go_mod_does_not_pin_is_an_error():
    with pytest.raises(LabSetupError, match="does not require"):
        kubernetes.sidecar_image("csi-resizer", "module x\n")
