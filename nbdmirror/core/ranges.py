"""Who holds which byte range, who waits, and who is next.

Owns the table of range locks of one device. Writers hold their range alone, readers and the resync
share theirs. A request that overlaps an earlier one, held or waiting, queues behind it: nobody
overtakes, so nobody starves. It never waits itself: a hold that is not granted carries a waiter.
"""

from collections.abc import Callable

from nbdmirror.core.ports import Waiter


class Hold:
    """One request for the bytes [start, end). `waiter` is None when it was granted at once."""

    __slots__ = ("end", "exclusive", "granted", "start", "waiter")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:  # noqa: FBT001 - hot
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.granted = True
        self.waiter: Waiter | None = None


class RangeLocks:
    """The range locks of one device, in order of arrival."""

    def __init__(self, new_waiter: Callable[[], Waiter]) -> None:
        self._new_waiter = new_waiter
        self._holds: list[Hold] = []
        self._waiting_count = 0

    def acquire(self, start: int, end: int, exclusive: bool) -> Hold:  # noqa: FBT001 - hot
        """Queue a request for [start, end). The caller waits on `waiter` unless it is None."""
        assert start < end
        hold = Hold(start, end, exclusive)
        for other in self._holds:
            if start < other.end and other.start < end and (exclusive or other.exclusive):
                hold.granted = False
                hold.waiter = self._new_waiter()
                self._waiting_count += 1
                break
        self._holds.append(hold)
        return hold

    def release(self, hold: Hold) -> None:
        """Give a hold back, granted or still waiting, and wake whoever became free by it."""
        self._holds.remove(hold)
        if not hold.granted:
            self._waiting_count -= 1
        if self._waiting_count:
            self._grant()

    def _grant(self) -> None:
        for index, hold in enumerate(self._holds):
            if not hold.granted and not self._blocked(hold, index):
                hold.granted = True
                self._waiting_count -= 1
                assert hold.waiter is not None
                hold.waiter.wake()

    def _blocked(self, hold: Hold, index: int) -> bool:
        return any(
            hold.start < other.end
            and other.start < hold.end
            and (hold.exclusive or other.exclusive)
            for other in self._holds[:index]
        )

    def overlaps(self, start: int, end: int) -> bool:
        """Whether anything held or waiting touches [start, end)."""
        return any(start < hold.end and hold.start < end for hold in self._holds)

    def oldest_shared(self) -> Hold | None:
        """The oldest hold that was granted and is shared: what a read in the file looks like."""
        return next((hold for hold in self._holds if hold.granted and not hold.exclusive), None)

    def __len__(self) -> int:
        return len(self._holds)
