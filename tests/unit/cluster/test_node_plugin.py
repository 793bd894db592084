"""The node plugin at its edges: kubelet, the start-up taint, health, metrics, events."""

import aiohttp

from csi_vduse.kube.resources import CORE_NODES, NODES, events
from tests.unit.cluster.conftest import ClusterNode, until

EVENTS = events("default").base


async def http(address, path):
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}{path}") as answer:
        return answer.status, await answer.text()


async def test_kubelet_registers_it_and_then_the_taint_goes(cluster):
    node = await cluster.start_node("n1")
    status, text = await http(node.http, "/readyz")
    assert (status, "kubelet has not registered" in text) == (503, True)
    info = await node.kubelet_registers()
    assert (info.type, info.name, info.endpoint) == ("CSIPlugin", "csi.vduse.dev", str(node.config.endpoint))
    assert list(info.supported_versions) == ["1.0.0"]
    await until(lambda: cluster.server.object(CORE_NODES.named("n1"))["spec"]["taints"] == [{"key": "other"}])
    assert (await http(node.http, "/readyz"))[0] == 200
    await cluster.stop("n1")
    assert not node.config.registration.exists()


async def test_without_a_fit_agent_it_does_not_register_and_says_why(cluster):
    node = ClusterNode(cluster.directory, "n1")
    node.agent.problems = ("/dev/vduse/control does not exist: modprobe vduse",)
    cluster.nodes["n1"] = node
    await cluster.start_node("n1")
    await until(lambda: cluster.server.objects(EVENTS))
    event = cluster.server.objects(EVENTS)[0]
    assert (event["type"], event["reason"], event["regarding"]["name"]) == ("Warning", "VduseNotReady", "n1")
    assert "modprobe vduse" in event["note"]
    await until(lambda: (cluster.server.object(NODES.named("n1")) or {}).get("status"))
    assert cluster.server.object(NODES.named("n1"))["status"]["problems"] == list(node.agent.problems)
    assert not node.config.registration.exists()
    status, text = await http(node.http, "/readyz")
    assert (status, "modprobe vduse" in text) == (503, True)
    assert (await http(node.http, "/healthz"))[0] == 200  # restarting the plugin would not help
    node.agent.problems = ()
    await node.kubelet_registers()


async def test_it_serves_metrics_of_its_calls_and_pools(cluster):
    node = await cluster.start_node("n1")
    await until(lambda: cluster.server.object(NODES.named("n1")))
    status, text = await http(node.http, "/metrics")
    assert status == 200
    assert 'csi_vduse_pool_size_bytes{pool="default"}' in text
    assert "csi_vduse_agent_up 1.0" in text


async def test_it_starts_while_the_api_is_away(cluster):
    await cluster.server.put(CORE_NODES.named("n1"), {"metadata": {"name": "n1", "uid": "u"}, "spec": {}})
    await cluster.server.go_away()
    node = await cluster.start_node("n1")
    await node.kubelet_registers()
    assert (await http(node.http, "/readyz"))[0] == 200
    cluster.server.away = False


async def test_an_api_that_stutters_is_no_problem_of_the_pool(cluster, monkeypatch):
    """Seen with a real server: a CRD made a moment ago cannot be listed yet, and the pool had no room for it."""
    monkeypatch.setattr("csi_vduse.services.node_status._RETRY_S", 0.05)
    cluster.server.failing = "/vdusesnapshots"
    await cluster.start_node("n1")
    await until(lambda: cluster.server.requests.count("GET /apis/csi.vduse.dev/v1alpha1/vdusesnapshots") > 5)
    assert cluster.server.object(NODES.named("n1")) is None
    cluster.server.failing = ""
    await until(lambda: (cluster.server.object(NODES.named("n1")) or {}).get("status"))
    assert "problem" not in cluster.server.object(NODES.named("n1"))["status"]["pools"][0]


async def test_the_controller_tells_whether_it_can_answer(cluster):
    await until(lambda: cluster.server.requests)
    assert (await http(cluster.http, "/healthz"))[0] == 200
