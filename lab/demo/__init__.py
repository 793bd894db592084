"""The main job shown on a real VDUSE kernel: `python -m lab.demo` inside a laboratory machine."""
