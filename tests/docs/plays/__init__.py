"""One module per page with Python blocks, named after the page: `play` runs its blocks in order (see tests/docs/play.py)."""
