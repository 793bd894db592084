"""The test program: how it is called, and what is heard of it while it runs.

What is kept true: it runs in the cluster's network, one spec at a time (the nodes share two processors with everything
else), and everything that it prints is in `suite.log`.
"""

import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lab.cluster import access
from lab.cluster.layout import Layout

DRIVER = Path(__file__).parent / "driver"
LOG = "suite.log"
JUNIT = "junit_01.xml"
SLOW = r"\[Slow\]"
SKIP = (
    # They restart kubelet over SSH.
    r"\[Disruptive\]",
    # It needs two images of Kubernetes' own that are not built here.
    "should provision storage with any volume data source",
    # It modifies claims that no pod asks for, which the API allows only if they are bound at once; ours wait for a pod.
    "multiple pods should modify volumes with a different volumeAttributesClass",
)
_TITLE = "External Storage "
_ENDED = ("• ", "S [")


def arguments(*, focus: str, skip: Iterable[str], timeout_h: float) -> list[str]:
    """What chooses the specs. focus: a regular expression for the part of their names after the driver's."""
    return [
        f"--storage.testdriver={DRIVER / 'testdriver.yaml'}",
        f"--repo-root={DRIVER}",
        "--provider=local",
        f"--ginkgo.focus=External.Storage.*(?:{focus})",
        f"--ginkgo.skip={'|'.join(skip)}",
        f"--ginkgo.timeout={timeout_h:g}h",
        "--ginkgo.no-color",
        "--ginkgo.v",
    ]


def on_cluster(layout: Layout, report: Path) -> list[str]:
    """What it needs to know of the cluster; report: the folder that it writes its report into."""
    return [
        f"--kubeconfig={layout.folder / f'{access.ADMIN}.kubeconfig'}",
        f"--kubectl-path={layout.kubectl}",
        f"--report-dir={report}",
        f"--e2e-output-dir={report}",
    ]


def listed(output: str) -> list[str]:
    """The names of the specs that a dry run printed, without the driver's part, in their order."""
    titles = [line for line in output.splitlines() if line.startswith(_TITLE)]
    return sorted(title.partition("] ")[2] for title in titles)


def progress(lines: Iterable[str]) -> Iterator[str]:
    """Of the lines that it prints, one for each spec that ended."""
    title = ""
    for line in lines:
        if line.startswith(_TITLE):
            title = line.partition("] ")[2].rstrip()
        elif line.startswith(_ENDED):
            yield f"{line.rstrip()} {title}"


def follow(argv: list[str], report: Path) -> int:
    """Run it to its end, print its progress, and return its exit code."""
    with (
        (report / LOG).open("w") as log,
        subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        try:
            for line in progress(_kept(process.stdout or (), log.write)):
                print(line, flush=True)
        except BaseException:
            process.terminate()  # it removes what its specs have made, and ends
            raise
    return process.returncode


def _kept(lines: Iterable[str], keep: Callable[[str], object]) -> Iterator[str]:
    for line in lines:
        keep(line)
        yield line
