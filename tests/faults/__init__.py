"""Faults put into the real pipeline, and what came of them: `make faults`."""
