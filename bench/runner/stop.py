"""A request to end, from a signal: whoever waits for something looks here, so that what was reached is still written."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STEP = 0.05  # seconds between two looks

_asked: list[int] = []


def reason() -> str | None:
    """Which signal asked for the end, or None."""
    return f"stopped by {signal.Signals(_asked[0]).name}" if _asked else None


def status() -> int:
    """The exit status of a process that a signal ended."""
    return 128 + _asked[0] if _asked else 0


@contextmanager
def listening() -> Iterator[None]:
    """For the length of the block a signal is a request: the first of them; later ones change nothing."""
    before = {number: signal.signal(number, lambda received, _: _asked.append(received)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def wait_for(done: Callable[[], bool], timeout: float, *, whatever: bool = False) -> bool:
    """Until `done()` or for `timeout` seconds; returns what done() says then. A request ends it unless `whatever`."""
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() >= end or (reason() and not whatever):
            return done()
        time.sleep(STEP)
    return True
