"""The CSI gRPC services: one file each, and what they share."""
