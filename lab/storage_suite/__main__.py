"""Runs Kubernetes' storage tests on the cluster of the laboratory: `python -m lab.storage_suite`, or `make test-suite`.

A cluster that is up is used; otherwise one is brought up, and stays. The driver is installed if it is not there. What is
kept true: report and log are in the results folder. Exit codes: 1 when a spec failed, or none passed; 125 when the
laboratory itself failed.
"""

import argparse
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab.cluster import bundle, suite
from lab.cluster.cluster import Cluster
from lab.cluster.layout import Layout
from lab.cluster.node import NodeMachine
from lab.cluster.steps import step
from lab.demo.story import ClaimFailed, Story
from lab.demo_kubernetes import life
from lab.errors import LabError, LabSetupError
from lab.host import run, say
from lab.paths import results_dir
from lab.storage_suite import program, report

FAILED = 125
_LIST_S = 120.0


def main(words: list[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    options = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    skip = program.SKIP if options.slow else (*program.SKIP, program.SLOW)
    chosen = program.arguments(focus=options.focus, skip=skip, timeout_h=options.timeout)
    try:
        built = suite.obtain()
        if options.list:
            argv = [str(built / "e2e.test"), *chosen, "--kubeconfig=none", "--ginkgo.dry-run"]
            print("\n".join(program.listed(run(argv, timeout_s=_LIST_S))))
            return 0
        return _run(Cluster(Layout(options.name)), built, chosen)
    except (ClaimFailed, LabError) as error:
        say(f"{type(error).__name__}: {error}")
        return FAILED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab.storage_suite", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--name", default="dev", help="which cluster (default: dev)")
    parser.add_argument("--focus", default="", metavar="REGEX", help="only specs whose names match")
    parser.add_argument("--slow", action="store_true", help="the slow ones too")
    parser.add_argument(
        "--timeout", type=float, default=3, metavar="HOURS", help="of the whole run (default: 3)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the specs; needs no cluster")
    return parser


def _run(cluster: Cluster, built: Path, chosen: list[str]) -> int:
    layout = cluster.layout
    cluster.ensure_up()
    if not cluster.kubectl("get", "csidrivers", life.DRIVER, "--ignore-not-found"):
        life.install(life.Shown(Story(), cluster))
    _import_images(layout, sorted((built / "images").glob("*.tar")))
    folder = results_dir() / "storage-suite"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    say(f"storage suite: everything that the tests say goes to {folder / program.LOG}")
    argv = layout.inside(str(built / "e2e.test"), *chosen, *program.on_cluster(layout, folder))
    exit_code = program.follow(argv, folder)
    if not (folder / program.JUNIT).exists():
        raise LabSetupError(f"the tests ended with {exit_code} and no report; see {folder / program.LOG}")
    specs = report.read(folder / program.JUNIT)
    print(report.text(specs), flush=True)
    if report.failed(specs):
        bundle.collect(layout)
        return 1
    return 0


def _import_images(layout: Layout, archives: list[Path]) -> None:
    with step("images of the storage suite"), ThreadPoolExecutor() as pool:
        for done in [pool.submit(NodeMachine(layout, node).import_images, archives) for node in layout.nodes]:
            done.result()


if __name__ == "__main__":
    sys.exit(main())
