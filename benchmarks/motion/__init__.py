"""Motion tasks on real pictures, in which single frames tell nothing: `python -m benchmarks.motion --help`."""
