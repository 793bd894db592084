"""The node's agent: decides about workers and devices; knows nothing of Kubernetes or CSI."""
