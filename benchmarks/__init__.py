"""Benchmarks: `pytest benchmarks/` times this library against its peers; see `providers.py` for what is compared."""
