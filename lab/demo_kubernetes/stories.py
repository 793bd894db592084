"""The stories by their names: what each of them is, step by step."""

from collections.abc import Callable

from lab.demo_kubernetes import faults, life, moving, served, upgrade
from lab.demo_kubernetes.life import Shown, install

Step = Callable[[Shown], None]

STORIES: dict[str, tuple[Step, ...]] = {
    "life": life.STEPS,
    "served": (install, *served.STEPS),
    "faults": (install, *faults.STEPS),
    "upgrade": (install, *upgrade.STEPS),
    "moving": (install, *moving.STEPS),
}
