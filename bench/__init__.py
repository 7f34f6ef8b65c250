"""Benchmarks; installed as ``dgate_rt.bench``. A number in the README comes from a command that runs these files."""
