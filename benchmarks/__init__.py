"""Measures VL-Mamba beside its peers on the machine at hand: `python -m benchmarks` (see __main__.py).

Every section is a module with `run(bench)`, where `bench` is a `benchmarks.bench.Bench`: the device, the budget left,
and `bench.add(...)` for one row of the report.
"""
