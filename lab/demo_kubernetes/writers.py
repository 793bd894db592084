"""Two pods, one on each node, that write to volumes and verify them while something happens to the driver.

What is kept true: a pause is the longest that one request had to wait from when something happens until both writers
have gone on after it; a writer that met an error or a wrong byte ends the story.
"""

import re
from collections.abc import Callable

from lab.demo.story import Story
from lab.demo_kubernetes.kubectl import Kubectl
from lab.errors import LabError
from lab.paths import CHECKOUT

PODS = ("verified-1", "verified-2")
_SCRIPT = CHECKOUT / "lab" / "demo_kubernetes" / "writer.py"
_TOLD = re.compile(r"(\d+) writes, the longest waited (\d+) ms")
_SETTLED_LINES = 3
"""Seconds of writing after an event that still count as its: what it stirred up has settled then."""


class Writers:
    """Both writers."""

    def __init__(self, kubectl: Kubectl, story: Story) -> None:
        """Describe them; `start` starts them."""
        self._kubectl = kubectl
        self._story = story

    def start(self) -> None:
        """Start them, and wait until both have written."""
        script = self._kubectl(
            "create", "configmap", "writer", f"--from-file={_SCRIPT}", "--dry-run=client", "-o", "yaml"
        )
        self._kubectl.apply_text(script)
        self._kubectl.apply("writers.yaml")
        for pod in PODS:
            self._kubectl.wait_ready(pod)
        self._wait_for_lines(dict.fromkeys(PODS, 1))

    def during(self, what: str, act: Callable[[], None]) -> None:
        """Do something, wait until both writers have gone on, and tell how long the longest request waited."""
        before = {pod: len(self._lines(pod)) for pod in PODS}
        act()
        # The line that was begun when the act began may hold its pause: one more than those that were there.
        self._wait_for_lines({pod: len(self._lines(pod)) + _SETTLED_LINES for pod in PODS})
        pauses = {pod: max(ms for _, ms in self._lines(pod)[count:]) for pod, count in before.items()}
        told = ", ".join(f"{pod} {ms} ms" for pod, ms in pauses.items())
        self._story.check(all(self._running(pod) for pod in PODS), f"{what}: no error; longest wait: {told}")

    def finish(self) -> None:
        """Let them compare every block, and see that nothing was wrong."""
        for pod in PODS:
            self._kubectl.sh(pod, "touch /tmp/stop")
        for pod in PODS:
            self._kubectl.wait_until(lambda pod=pod: not self._running(pod), f"{pod} ends")  # type: ignore[misc]
            phase = self._kubectl.object("pod", pod)["status"]["phase"]
            last = self._kubectl("logs", pod, "--tail=1")
            self._story.check(phase == "Succeeded", f"{pod}: {last}")
        self._kubectl.delete("writers.yaml")

    def _running(self, pod: str) -> bool:
        return bool(self._kubectl.object("pod", pod)["status"]["phase"] == "Running")

    def _lines(self, pod: str) -> list[tuple[int, int]]:
        log = self._kubectl("logs", pod)
        return [(int(writes), int(ms)) for writes, ms in _TOLD.findall(log)]

    def _wait_for_lines(self, counts: dict[str, int]) -> None:
        for pod, count in counts.items():

            def gone_on(pod: str = pod, count: int = count) -> bool:
                if not self._running(pod):
                    raise LabError(f"{pod} has ended:\n{self._kubectl('logs', pod, '--tail=20')}")
                return len(self._lines(pod)) >= count

            self._kubectl.wait_until(gone_on, f"{pod} writes on")
