"""The parts of `results.py`."""
