"""Benchmarks and audits of the kernels: `python -m bench --help`. Not installed with the package."""
