"""Turns signals into requests to stop. Every wait checks for a request, so that results so far are still written."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STEP = 0.05  # seconds between two checks

_received: list[int] = []


def reason() -> str | None:
    """The signal that requested the stop, or None."""
    return f"stopped by {signal.Signals(_received[0]).name}" if _received else None


def status() -> int:
    """The exit status after a request to stop; 0 without one."""
    return 128 + _received[0] if _received else 0


@contextmanager
def listening() -> Iterator[None]:
    """Within the block, record signals as requests to stop. Signals after the first one have no effect."""
    before = {number: signal.signal(number, lambda received, _: _received.append(received)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def wait_for(done: Callable[[], bool], timeout: float, *, whatever: bool = False) -> bool:
    """Wait until `done()` or for `timeout` seconds; returns `done()`. A request to stop ends the wait unless `whatever`."""
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() >= end or (reason() and not whatever):
            return done()
        time.sleep(STEP)
    return True
