"""Control side of each backend: create, delete, expand, snapshot, clone, capacity."""
