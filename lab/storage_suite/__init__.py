"""Kubernetes' own storage tests against the driver, on the cluster of the laboratory: `python -m lab.storage_suite`.

`driver/` says what the driver can do and which classes are used; docs/cluster-lab.md says what a run contains.
"""
