"""`kubectl vduse`: what it says of a cluster, and its exit codes."""

import argparse
import datetime as dt
import json

import pytest

from csi_vduse.errors import NotFound
from csi_vduse.kube.resources import NODES, VOLUMES
from csi_vduse.kubectl import commands
from csi_vduse.kubectl.checks import Cluster, examine
from csi_vduse.kubectl.main import main
from csi_vduse.kubectl.rates import quantile_s, rates, read
from csi_vduse.volumes.kubernetes_objects import volume_object
from tests.unit.volumes.test_registry_directory import a_volume

NOW = dt.datetime(2026, 11, 26, tzinfo=dt.UTC)


def node(name="n1", *, silent_s=10, **status):
    seen = (NOW - dt.timedelta(seconds=silent_s)).isoformat()
    fit = {"ready": True, "version": "1", "agentVersion": "1", "lastSeen": seen, "pools": []}
    return {"metadata": {"name": name}, "status": {**fit, **status}}


def volume(name="v", *, age_s=1000, deleted_s=None, **status):
    found = volume_object(a_volume(name, node="n1"))
    found["metadata"]["creationTimestamp"] = (NOW - dt.timedelta(seconds=age_s)).isoformat()
    if deleted_s is not None:
        found["metadata"]["deletionTimestamp"] = (NOW - dt.timedelta(seconds=deleted_s)).isoformat()
    return {**found, "status": {"state": "Ready", **status}}


def verdicts(nodes=(), volumes=(), pvs=()):
    return {(one.about, one.verdict) for one in examine(Cluster(NOW, nodes, volumes, (), pvs))}


def test_a_sound_cluster_is_good():
    assert verdicts([node()], [volume()]) == {("node n1", "good")}


def test_doctor_names_what_is_wrong_with_nodes():
    assert ("nodes", "bad") in verdicts()
    assert ("node n1", "bad") in verdicts([node(silent_s=600)])
    assert ("node n1", "bad") in verdicts([node(ready=False, problems=["modprobe vduse"])])
    assert ("node n1", "warning") in verdicts([node(agentVersion="0")])
    pool = {"name": "default", "kind": "file", "problem": "not mounted"}
    assert ("node n1, pool default", "bad") in verdicts([node(pools=[pool])])


def test_doctor_names_what_is_wrong_with_volumes():
    id_ = a_volume().id
    about = f"VduseVolume {id_}"
    assert (about, "bad") in verdicts(
        [node()], [volume(health={"status": "Inaccessible", "message": "gone"})]
    )
    assert (about, "warning") in verdicts([node()], [volume(deleted_s=600)])
    assert (about, "warning") in verdicts([node()], [volume(state="")])
    assert (about, "warning") in verdicts([node()], [volume(error={"message": "no", "hint": "do"})])
    handle = {"driver": "csi.vduse.dev", "volumeHandle": "vol-other"}
    pv = {"metadata": {"name": "pv1"}, "spec": {"csi": handle}}
    found = verdicts([node()], [volume()], [pv])
    assert ("PersistentVolume pv1", "bad") in found
    assert (about, "warning") in found


def test_an_export_that_was_made_beforehand_is_no_lost_volume():
    handle = {"driver": "csi.vduse.dev", "volumeHandle": "erp-db", "volumeAttributes": {"uri": "nbd://h/erp"}}
    assert verdicts([node()], [], [{"metadata": {"name": "pv1"}, "spec": {"csi": handle}}]) == {
        ("node n1", "good")
    }


def metrics(operations, slow):
    labels = 'volume_id="vol-1",backend="file",operation="read"'
    return (
        "# TYPE csi_vduse_volume_operations_total counter\n"
        f"csi_vduse_volume_operations_total{{{labels}}} {operations}\n"
        "# TYPE csi_vduse_volume_bytes_total counter\n"
        f"csi_vduse_volume_bytes_total{{{labels}}} {operations * 4096}\n"
        "# TYPE csi_vduse_volume_latency_seconds histogram\n"
        f'csi_vduse_volume_latency_seconds_bucket{{{labels},le="0.001"}} {operations - slow}\n'
        f'csi_vduse_volume_latency_seconds_bucket{{{labels},le="0.008"}} {operations}\n'
        f'csi_vduse_volume_latency_seconds_bucket{{{labels},le="+Inf"}} {operations}\n'
    )


def test_rates_are_those_of_the_time_between_two_readings():
    rate = rates(read(metrics(1000, 900)), read(metrics(3000, 900)), 2.0)["vol-1", "read"]
    assert (rate.iops, rate.bytes_per_s) == (1000, 1000 * 4096)
    assert rate.median_s == pytest.approx(0.0005)


def test_a_volume_that_was_attached_anew_counts_from_zero():
    rate = rates(read(metrics(1000, 0)), read(metrics(50, 0)), 1.0)["vol-1", "read"]
    assert rate.iops == 50


def test_quantiles_without_requests_are_unknown_and_beyond_the_last_bound_are_that_bound():
    assert quantile_s({0.1: 0.0, float("inf"): 0.0}, 0.5) is None
    assert quantile_s({0.1: 1.0, float("inf"): 10.0}, 0.99) == 0.1


async def test_unused_refuses_while_a_volume_is_attached(api, server, capsys):
    await api.create(VOLUMES, volume_object(a_volume(node="n1")))
    assert await commands.unused(api, argparse.Namespace()) == 0
    await server.set_status(VOLUMES.named(a_volume().id), attachment={"node": "n1"})
    assert await commands.unused(api, argparse.Namespace()) == 1
    assert "in use on n1" in capsys.readouterr().out


async def test_list_and_inspect_show_a_volume(api, server, capsys):
    await api.create(VOLUMES, volume_object(a_volume(node="n1")))
    await server.set_status(VOLUMES.named(a_volume().id), state="Ready", capacity="1Mi")
    assert await commands.list_volumes(api, argparse.Namespace(node="")) == 0
    assert a_volume().id in capsys.readouterr().out
    assert await commands.inspect(api, argparse.Namespace(volume="v")) == 0
    assert "parameters.bus" in capsys.readouterr().out
    with pytest.raises(NotFound, match="kubectl vduse list"):
        await commands.inspect(api, argparse.Namespace(volume="unknown"))


async def test_upgrade_tells_which_nodes_are_behind(api, server, capsys):
    for name, agent in (("n1", "2"), ("n2", "1")):
        await server.put(
            NODES.named(name), {"metadata": {"name": name}, "status": {"version": "2", "agentVersion": agent}}
        )
    assert await commands.upgrade(api, argparse.Namespace(to="2", wait=0.0)) == 1
    assert "waits" in capsys.readouterr().out
    await server.set_status(NODES.named("n2"), agentVersion="2")
    assert await commands.upgrade(api, argparse.Namespace(to="2", wait=0.0)) == 0


async def test_doctor_prints_json(api, server, capsys):
    assert await commands.doctor(api, argparse.Namespace(output="json")) == 1
    assert json.loads(capsys.readouterr().out)[0]["about"] == "nodes"


def test_wrong_usage_and_no_cluster_are_told_apart(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        main(["top", "--interval", "never"])
    assert caught.value.code == 2
    assert main(["--kubeconfig", str(tmp_path / "missing"), "list"]) == 1
    assert "kubectl vduse:" in capsys.readouterr().err
