"""What is measured, how, and against whom.

`make bench` measures everything; `python -m bench PART` one part of it, `python -m bench report` makes tables
and plots of what was measured. A part is a module with a function that returns its raw figures; nothing is
judged while measuring, and everything measured is kept as JSON (bench/results.py).
"""
