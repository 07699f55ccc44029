"""Measurements of the kernels: `python -m bench --help`. Nothing here is installed with the package."""
