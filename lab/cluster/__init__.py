"""A Kubernetes cluster whose nodes have VDUSE: the control plane on the host, each node a VM of the laboratory.

`python -m lab.cluster --help`; docs/cluster-lab.md says what it needs and how long each step takes.
"""
