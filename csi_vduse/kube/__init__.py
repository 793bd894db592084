"""The Kubernetes API, isolated: the one place that imports the package `kubernetes`."""
