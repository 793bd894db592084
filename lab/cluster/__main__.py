"""The cluster lab at the command line: `python -m lab.cluster --help`.

Exit codes: those of kubectl and helm; 125 when the laboratory itself failed.
"""

import argparse
import os
import signal
import sys

from lab.cluster import bundle, network
from lab.cluster.cluster import Cluster
from lab.cluster.layout import Layout
from lab.cluster.node import NodeMachine
from lab.errors import LabError
from lab.host import say

FAILED = 125


def main(words: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    options = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cluster = Cluster(Layout(options.name))
    try:
        match options.action:
            case "build":
                cluster.build()
            case "up":
                cluster.up()
                say(f"cluster: up; {cluster.layout.kubectl} get nodes")
            case "down":
                cluster.down()
            case "logs":
                bundle.collect(cluster.layout)
            case "kubectl" | "helm":
                return _exec(cluster, options.action, options.words)
            case "node":
                return _on_node(cluster, options.words)
    except LabError as error:
        say(f"{type(error).__name__}: {error}")
        return FAILED
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab.cluster", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--name", default="dev", help="which cluster (default: dev)")
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, text in (
        ("build", "build everything that a cluster needs, as far as the cache lacks it"),
        ("up", "build, and bring a cluster up"),
        ("down", "end the cluster"),
        ("logs", "collect logs and state into the results folder"),
    ):
        actions.add_parser(name, help=text, description=text)
    for name, text in (
        ("kubectl", "run kubectl on the cluster"),
        ("helm", "run helm on the cluster"),
        ("node", "run a command on a node: `node node-1 dmesg`"),
    ):
        sub = actions.add_parser(name, help=text, description=text)
        sub.add_argument("words", nargs=argparse.REMAINDER)
    return parser


def _up(cluster: Cluster) -> None:
    if not network.exists(cluster.layout):
        raise LabError(f"the cluster `{cluster.layout.name}` is not up; `make cluster-up` starts one")


def _exec(cluster: Cluster, program: str, words: list[str]) -> int:
    _up(cluster)
    script = cluster.layout.kubectl if program == "kubectl" else cluster.layout.helm
    os.execv(script, [str(script), *words])  # noqa: S606 -- a script of ours, argv as given


def _on_node(cluster: Cluster, words: list[str]) -> int:
    _up(cluster)
    for node in cluster.layout.nodes:
        if words and words[0] == node.name:
            return NodeMachine(cluster.layout, node).machine().stream(words[1:] or ["bash", "-l"])
    names = ", ".join(node.name for node in cluster.layout.nodes)
    raise LabError(f"which node? one of {names}")


if __name__ == "__main__":
    sys.exit(main())
