"""The kernel's vDPA bus: generic netlink, sysfs, and binding a device to one of its two drivers."""
