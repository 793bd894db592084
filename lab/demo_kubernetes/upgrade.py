"""Another release of the driver, and back, while two pods write and verify."""

from lab.cluster import product_image
from lab.demo_kubernetes import helm
from lab.demo_kubernetes.faults import begin, end
from lab.demo_kubernetes.life import Shown
from lab.demo_kubernetes.writers import Writers

NEXT = "0.1.1"


def carry(shown: Shown) -> None:
    """The image of the next release comes to the nodes."""
    shown.story.step(f"Bring the image of release {NEXT} to the nodes")
    image = product_image.obtain(NEXT) / "image.tar"
    for machine in shown.machines:
        machine.import_images([image])
    shown.story.seen(_versions(shown))


def upgrade(shown: Shown) -> None:
    """Helm replaces controller, node plugins and agents; the agents hand their workers over."""
    shown.story.step(f"helm upgrade to {NEXT} under verified I/O")
    shown.story.asked(f"helm upgrade {helm.RELEASE} ... --set image.tag={NEXT}")
    _writers(shown).during(
        f"helm upgrade to {NEXT}", lambda: helm.release(shown.cluster, "--set", f"image.tag={NEXT}")
    )
    _see_versions(shown, NEXT)


def roll_back(shown: Shown) -> None:
    """The same, backwards."""
    shown.story.step("helm rollback under verified I/O")
    shown.story.asked(f"helm rollback {helm.RELEASE}")
    _writers(shown).during("helm rollback", lambda: helm.rollback(shown.cluster))
    _see_versions(shown, shown.cluster.version)


STEPS = (begin, carry, upgrade, roll_back, end)


def _writers(shown: Shown) -> Writers:
    return Writers(shown.kubectl, shown.story)


def _see_versions(shown: Shown, version: str) -> None:
    """Both parts of every node's driver say which release they are; its status is written every half minute."""

    def all_are() -> bool:
        statuses = [found["status"] for found in shown.kubectl.objects("vdusenodes")]
        return all({one["version"], one["agentVersion"]} == {version} for one in statuses)

    shown.kubectl.wait_until(all_are, f"every node says {version}")
    shown.story.seen(_versions(shown))
    shown.story.seen(shown.driver("get", "pods", "-o", "wide"))
    shown.story.check(all_are(), f"node plugin and agent of every node are release {version}")


def _versions(shown: Shown) -> str:
    columns = "NODE:.metadata.name,PLUGIN:.status.version,AGENT:.status.agentVersion"
    return shown.kubectl("get", "vdusenodes", "-o", f"custom-columns={columns}")
