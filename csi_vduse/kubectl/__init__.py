"""`kubectl vduse`: the driver as one sees it from outside the cluster, with a person's own rights."""
