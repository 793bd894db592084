"""The worker: one process that serves one volume. Stands alone: no gRPC, no Kubernetes."""
