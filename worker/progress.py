"""One line at the bottom of a terminal that says how it goes; none where nobody looks.

Beside the path of a message: the pipeline's thread calls `tick` whenever it comes by.
"""

from __future__ import annotations

from collections import deque

from inferbus.worker.logs import Screen
from inferbus.worker.metrics import Metrics

INTERVAL = 0.25
WINDOW = 2.0


class ProgressLine:
    """Redraws itself from `metrics` at most four times a second; the rate is that of the last two seconds.

    Args:
        metrics: What is counted.
        screen: Where it is shown.
        bounded: The source has an end: what is left is shown, and about how long it takes.
    """

    def __init__(self, metrics: Metrics, screen: Screen, *, bounded: bool = False) -> None:
        self._metrics = metrics
        self._screen = screen
        self._bounded = bounded
        self._due = float("-inf")
        self._seen: deque[tuple[float, int]] = deque()  # time, outcomes by then

    def tick(self, now: float) -> None:
        """Redraw if it is time; `now` is in monotonic seconds."""
        if not self._screen.live or now < self._due:
            return
        self._due = now + INTERVAL
        totals = self._metrics.totals()
        done = totals.ok + totals.errors
        rate = self._rate(now, done)
        parts = [
            f"{rate:,.0f}/s",
            f"in flight {totals.inflight:,}",
            f"ok {totals.ok:,}",
            f"errors {totals.errors:,}",
        ]
        if totals.lag is not None and self._bounded:
            # Lines not read yet are an estimate, by the size of those that were.
            parts[:2] = _share(done, totals.received + totals.lag), f"{rate:,.0f}/s"
            if rate > 0:
                parts.insert(2, f"{_clock((totals.received + totals.lag - done) / rate)} left")
        elif totals.lag is not None:
            parts.insert(1, f"lag {totals.lag:,}")
        self._screen.show("  ".join(parts))

    def close(self) -> None:
        """Take the line away."""
        self._screen.show("")

    def _rate(self, now: float, outcomes: int) -> float:
        self._seen.append((now, outcomes))
        # Keep one look older than the window, so that the rate spans the whole of it.
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW:
            self._seen.popleft()
        before, then = self._seen[0]
        return (outcomes - then) / (now - before) if now > before else 0.0


def _share(done: int, all_: int) -> str:
    """A bar of twenty, and the numbers."""
    filled = 20 * done // all_ if all_ else 20
    return f"[{'#' * filled}{'.' * (20 - filled)}] {done:,} of {all_:,}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
