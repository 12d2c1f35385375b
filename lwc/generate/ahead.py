"""An iterator that works ahead: its next item is made while the last one is dealt with."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

__all__ = ["work_ahead"]

T = TypeVar("T")


def work_ahead(items: Iterable[T]) -> Generator[T]:
    """Yield items that a thread of its own makes, at most two more than were taken.

    Were it one, the thread would wait at each item until the one before it is taken. What an
    item's making raises is raised where the item would be yielded. Closing the iterator ends the
    thread after the item it is at.
    """
    made: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    room = threading.Semaphore(1)
    closed = threading.Event()

    def work() -> None:
        try:
            for item in items:
                made.put((item,))
                room.acquire()
                if closed.is_set():
                    return
            made.put(None)
        except BaseException as error:
            made.put(error)

    thread = threading.Thread(target=work, name="lwc-work-ahead", daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item[0]
    finally:
        closed.set()
        room.release()
        thread.join()
