"""The storage server: images in a directory, exported over NBD by one qemu-storage-daemon that is driven by QMP."""
