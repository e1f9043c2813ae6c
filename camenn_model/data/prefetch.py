"""Compute batches ahead of their use."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")
U = TypeVar("U")


def map_ahead(work: Callable[[T], U], source: Iterator[T], workers: int) -> Iterator[U]:
    """Map `work` over the elements ahead of their use.

    Results are in the source's order. Up to `workers` are in work at a time and as many waiting.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="gather") as pool:
        ahead: deque[Future[U]] = deque()
        try:
            for element in source:
                ahead.append(pool.submit(work, element))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def prefetch(source: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Run an iterator in a thread, `depth` elements ahead.

    Gathering from mapped files and computing overlap.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for element in source:
                while not stop.is_set():
                    try:
                        ready.put((element, None), timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            element, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            # None only beside an error, unless the source itself yields None.
            yield cast(T, element)
    finally:
        stop.set()
