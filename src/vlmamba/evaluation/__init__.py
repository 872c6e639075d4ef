"""Evaluation: eight benchmarks scored as their official tools score them, a runner that survives a kill, a report."""
