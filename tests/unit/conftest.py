"""What all unit tests share: no property may fail because a machine is busy with something else."""

from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
