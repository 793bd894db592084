"""What Prometheus sees: the workers' counters under their names, and that the documentation lists them all."""

from __future__ import annotations

import re
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from csi_vduse import metrics
from csi_vduse.agent.model import OperationStats, RemoteStats, State, VolumeStats, count_states
from csi_vduse.errors import FailedPrecondition, InvalidArgument, Unavailable

# Half a microsecond, 8 us, and 16 to 18 us.
READ = OperationStats("read", 6, 4096, 1, 0.5, 0.3, tuple({4: 1, 32: 2, 40: 3}.get(i, 0) for i in range(41)))
VOLUME = VolumeStats(
    "vol-1",
    "file",
    (READ,),
    in_flight=2,
    kicks=3,
    interrupts=4,
    batches=5,
    malformed=6,
    batch_sizes=(4, 1),
    depths=(0, 0, 5),
    data_max_bytes=7,
    bounce_bytes=8,
    throttled=9,
    throttled_s=1.5,
    waiting=1,
    unanswered_s=31.5,
    stalled_s=12.25,
    remote=RemoteStats("refused", "too small", resent=11, latency_sum_s=0.25, latency=READ.latency),
)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
        return free


@pytest.fixture
def page(port: int) -> str:
    stop = metrics.serve(f"127.0.0.1:{port}", lambda: ([VOLUME], {"attached": 1}))
    metrics.observe_rpc("/csi.v1.Node/NodeStageVolume", "OK", 0.02)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    stop()
    return text


def value(page: str, name: str, **labels: str) -> float:
    for line in page.splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name:
            have = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if labels.items() <= have.items():
                return float(match[3])
    raise AssertionError(f"no {name} {labels} in {page}")


def test_counters_of_a_volume_are_served(page: str):
    labels = {"volume_id": "vol-1", "backend": "file"}
    assert value(page, "csi_vduse_volume_operations_total", operation="read", **labels) == 6
    assert value(page, "csi_vduse_volume_bytes_total", operation="read", **labels) == 4096
    assert value(page, "csi_vduse_volume_errors_total", operation="read", **labels) == 1
    assert value(page, "csi_vduse_volume_requests_in_flight", **labels) == 2
    assert value(page, "csi_vduse_volume_kicks_total", **labels) == 3
    assert value(page, "csi_vduse_volume_interrupts_total", **labels) == 4
    assert value(page, "csi_vduse_volume_batches_total", **labels) == 5
    assert value(page, "csi_vduse_volume_malformed_requests_total", **labels) == 6
    assert value(page, "csi_vduse_volume_throttled_total", **labels) == 9
    assert value(page, "csi_vduse_volume_throttled_seconds_total", **labels) == 1.5
    assert value(page, "csi_vduse_volume_requests_waiting", **labels) == 1
    assert value(page, "csi_vduse_volume_unanswered_seconds", **labels) == 31.5
    assert value(page, "csi_vduse_volume_stalled_seconds_total", **labels) == 12.25
    assert value(page, "csi_vduse_volume_data_in_flight_max_bytes", **labels) == 7
    assert value(page, "csi_vduse_volume_bounce_size_bytes", **labels) == 8
    assert value(page, "csi_vduse_attachments", state="attached") == 1
    assert value(page, "csi_vduse_rpc_seconds_count", method="/csi.v1.Node/NodeStageVolume", code="OK") >= 1


def test_the_state_of_a_server_and_its_own_latency_are_served(page: str):
    assert value(page, "csi_vduse_remote_state", volume_id="vol-1", state="refused") == 1
    assert value(page, "csi_vduse_remote_state", volume_id="vol-1", state="connected") == 0
    assert value(page, "csi_vduse_remote_resent_total", volume_id="vol-1") == 11
    assert value(page, "csi_vduse_remote_latency_seconds_count", volume_id="vol-1") == 6
    assert value(page, "csi_vduse_remote_latency_seconds_sum", volume_id="vol-1") == 0.25


def test_batch_sizes_and_queue_depths_are_histograms(page: str):
    name = "csi_vduse_volume_batch_requests_bucket"
    assert [value(page, name, le=le) for le in ("1.0", "2.0", "1024.0", "+Inf")] == [4, 5, 5, 5]
    name = "csi_vduse_volume_queue_depth_bucket"
    assert [value(page, name, le=le) for le in ("2.0", "4.0", "+Inf")] == [0, 5, 5]


def test_latency_buckets_are_cumulative_powers_of_two_microseconds(page: str):
    name = "csi_vduse_volume_latency_seconds"
    assert [value(page, f"{name}_bucket", le=le) for le in ("8e-06", "1.6e-05", "3.2e-05", "+Inf")] == [
        1,
        3,
        6,
        6,
    ]
    assert value(page, f"{name}_count") == 6
    assert value(page, f"{name}_sum") == 0.5


def test_the_documentation_lists_every_metric(page: str):
    documented = Path(__file__).parents[3].joinpath("docs/metrics.md").read_text()
    served = set(re.findall(r"^# TYPE (csi_vduse_\w+) ", page, re.MULTILINE))
    served = {name for name in served if not name.endswith("_created")}
    assert served
    assert not {name for name in served if f"`{name}" not in documented}


def test_a_flag_is_served_from_when_it_was_set():
    flag = metrics.Flag("csi_vduse_of_this_test", "no text")
    assert "csi_vduse_of_this_test" not in generate_latest().decode()
    flag.set(False)
    assert value(generate_latest().decode(), "csi_vduse_of_this_test") == 0
    flag.set(True)
    assert value(generate_latest().decode(), "csi_vduse_of_this_test") == 1


def test_states_that_no_volume_is_in_are_counted_too():
    counted = count_states([State.ATTACHED, State.ATTACHED])
    assert counted[State.ATTACHED] == 2
    assert {counted[state] for state in State if state is not State.ATTACHED} == {0}


def test_a_scrape_without_an_agent_still_has_the_rest(port: int):
    def read() -> tuple[list[VolumeStats], dict[str, int]]:
        raise Unavailable("no agent")

    stop = metrics.serve(f"127.0.0.1:{port}", read)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    stop()
    assert value(page, "csi_vduse_agent_up") == 0
    assert "csi_vduse_rpc_seconds" in page


def test_an_address_that_is_taken_is_reported(port: int):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(FailedPrecondition, match=str(port)):
            metrics.serve(f"127.0.0.1:{port}", lambda: ([], {}))
    metrics.serve(f"127.0.0.1:{port}", lambda: ([], {}))()  # nothing stayed registered


@pytest.mark.parametrize("text", ["", "9180", "host:", ":9180", "host:http", "host:0", "host:70000"])
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(InvalidArgument, match="HOST:PORT"):
        metrics.parse_address(text)


def test_an_address_may_be_ipv6():
    assert metrics.parse_address("[::1]:9180") == ("::1", 9180)
