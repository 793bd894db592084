"""How the demo talks: numbered steps, what was asked, what is seen, and claims that are checked.

What is kept true: a claim that does not hold ends the demo; nothing is said to be OK that was not compared.
"""

import time


class ClaimFailed(Exception):
    """Something that the demo claims is not so."""


class Story:
    """Prints as it goes."""

    def __init__(self) -> None:
        """Step numbers start at 1."""
        self._step = 0
        self._started = time.monotonic()
        self.claims = 0

    def step(self, title: str) -> None:
        """Begin the next step."""
        self._step += 1
        elapsed_s = time.monotonic() - self._started
        print(f"\n{self._step:2}. {title}  [{elapsed_s:.0f} s]", flush=True)

    def asked(self, text: str) -> None:
        """Say what is asked of the driver or done by the pod."""
        print(f"    asked  {text}", flush=True)

    def seen(self, text: str) -> None:
        """Show what came of it; one line each."""
        for line in text.splitlines():
            print(f"    seen   {line}", flush=True)

    def check(self, holds: bool, claim: str) -> None:  # noqa: FBT001 -- reads as a sentence
        """Say OK, or end the demo with ClaimFailed."""
        if not holds:
            print(f"    FAILED {claim}", flush=True)
            raise ClaimFailed(claim)
        self.claims += 1
        print(f"    OK     {claim}", flush=True)
