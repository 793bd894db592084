"""The storage suite: what is read from its report and its output, and that its parts fit each other."""

import re

import pytest

from csi_vduse import DRIVER_NAME
from csi_vduse.volumes.topology import TOPOLOGY_KEY
from lab.cluster import small_images
from lab.cluster.layout import KUBERNETES, Layout
from lab.cluster.suite import MODULE
from lab.storage_suite import program, report
from lab.storage_suite.report import Result

JUNIT = """<testsuites><testsuite>
<testcase name="[SynchronizedBeforeSuite]" status="passed" time="2"/>
<testcase name="[It] External Storage [Driver: csi.vduse.dev] [Testpattern: B] passes" status="passed" time="63.4"/>
<testcase name="[It] External Storage [Driver: csi.vduse.dev] [Testpattern: A] fails" status="failed" time="301">
  <failure message="" type="failed">[FAILED] timed out waiting\nIn [It] at: x.go:1</failure><system-err>y</system-err>
</testcase>
<testcase name="[It] External Storage [Driver: csi.vduse.dev] [Testpattern: C] hangs" status="timedout" time="9">
  <error message="A suite timeout occurred" type="timedout"/>
</testcase>
<testcase name="[It] External Storage [Driver: csi.vduse.dev] [Testpattern: D] is not for us" status="skipped" time="0">
  <skipped message="skipped - no ntfs"/>
</testcase>
<testcase name="[It] [sig-node] is another suite's" status="skipped" time="0"><skipped message="skipped"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def junit(tmp_path):
    def write(text):
        (tmp_path / "junit.xml").write_text(text)
        return tmp_path / "junit.xml"

    return write


def test_a_spec_is_in_one_list_and_what_was_filtered_out_in_none(junit):
    specs = report.read(junit(JUNIT))

    assert [(spec.name, spec.result) for spec in specs] == [
        ("[Testpattern: A] fails", Result.FAILED),
        ("[Testpattern: B] passes", Result.PASSED),
        ("[Testpattern: C] hangs", Result.FAILED),
        ("[Testpattern: D] is not for us", Result.SKIPPED),
    ]


def test_the_reason_is_one_line(junit):
    reasons = {spec.name[-5:]: spec.reason for spec in report.read(junit(JUNIT))}

    assert reasons["fails"] == "timed out waiting"
    assert reasons["hangs"] == "A suite timeout occurred"
    assert reasons["or us"] == "no ntfs"


def test_the_text_ends_with_the_counts_after_the_failures(junit):
    lines = report.text(report.read(junit(JUNIT))).splitlines()

    assert lines[0] == "passed   63 s  [Testpattern: B] passes"
    assert lines[-3] == "failed    9 s  [Testpattern: C] hangs"
    assert lines[-1] == "1 passed, 1 skipped, 2 failed"


def test_a_set_up_that_failed_is_a_failure(junit):
    broken = (
        '<testcase name="[SynchronizedBeforeSuite]" time="1"><failure>[FAILED] no node</failure></testcase>'
    )
    specs = report.read(junit(f"<testsuites>{broken}</testsuites>"))

    assert report.failed(specs)
    assert specs[0].reason == "no node"


def test_a_run_that_tested_nothing_is_a_failure(junit):
    assert report.failed(report.read(junit("<testsuites/>")))


def test_progress_is_one_line_for_each_spec_that_ended():
    printed = """Will run 2 of 864 specs
------------------------------
External Storage [Driver: csi.vduse.dev] [Testpattern: A] passes
k8s.io/x.go:156
  STEP: Creating a pod
• [63.400 seconds]
------------------------------
SSSS
External Storage [Driver: csi.vduse.dev] [Testpattern: B] fails
• [FAILED] [9.000 seconds]
External Storage [Driver: csi.vduse.dev] [Testpattern: B] [It] fails
"""

    assert list(program.progress(printed.splitlines(keepends=True))) == [
        "• [63.400 seconds] [Testpattern: A] passes",
        "• [FAILED] [9.000 seconds] [Testpattern: B] fails",
    ]


def test_a_dry_run_lists_names_without_the_drivers_part():
    printed = "Will run\nExternal Storage [Driver: csi.vduse.dev] [Testpattern: A] passes\nk8s.io/x.go:156\n"

    assert program.listed(printed) == ["[Testpattern: A] passes"]


def test_a_focus_with_alternatives_stays_within_the_storage_suite():
    (focus,) = [
        word
        for word in program.arguments(focus="volumes|topology", skip=(), timeout_h=3)
        if word.startswith("--ginkgo.focus=")
    ]

    assert not re.search(focus.partition("=")[2], "[sig-network] topology")
    assert re.search(focus.partition("=")[2], "External Storage [Driver: x] [Testpattern: A] topology works")


def test_it_talks_to_the_cluster_as_its_administrator(tmp_path, monkeypatch):
    monkeypatch.setenv("CSI_VDUSE_CACHE", str(tmp_path))
    layout = Layout("x")

    assert f"--kubeconfig={layout.folder}/admin.kubeconfig" in program.on_cluster(layout, tmp_path)


def test_the_tests_are_those_of_the_kubernetes_that_the_cluster_runs():
    suite, cluster = ((folder / "go.mod").read_text() for folder in (MODULE, MODULE.parent / "kube"))

    assert f"k8s.io/kubernetes v{KUBERNETES}\n" in suite
    assert f"k8s.io/kubernetes v{KUBERNETES}\n" in cluster


def test_the_description_is_of_this_driver():
    described = (program.DRIVER / "testdriver.yaml").read_text()

    assert f"Name: {DRIVER_NAME}\n" in described
    assert f"TopologyKeys: [{TOPOLOGY_KEY}]\n" in described


def test_the_suites_images_can_all_be_written(tmp_path):
    agnhost = tmp_path / "agnhost"
    agnhost.write_bytes(b"\x7fELF")
    target = tmp_path / "images"
    target.mkdir()
    if not small_images.BUSYBOX.exists():
        pytest.skip("busybox-static is not installed")
    small_images.write_suite_images(agnhost, target)

    assert len(list(target.glob("*.tar"))) == len(small_images.SUITE_IMAGES)
