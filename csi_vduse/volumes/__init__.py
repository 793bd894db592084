"""The domain: what volumes and snapshots are, their ids, sizes, access policy, where they are recorded."""
