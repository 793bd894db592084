"""csi-vduse: Kubernetes volumes as VDUSE devices."""

__version__ = "0.1.0"
DRIVER_NAME = "csi.vduse.dev"
