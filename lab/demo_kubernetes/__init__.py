"""The driver's main job on Kubernetes, told and checked: `make demo-kubernetes`."""
