"""Motion tasks on real pictures, in which single frames carry no information: `python -m benchmarks.motion --help`."""
