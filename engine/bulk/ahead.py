"""Work of several threads ahead of the one that uses it, in order and within bounds."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T, U = TypeVar("T"), TypeVar("U")
END = object()


class _Shelf:
    """What the threads made and nobody took yet, `most` pieces at a time. The source whose pieces
    are taken now may always put one, so that it never waits for those after it."""

    def __init__(self, most: int):
        self.most, self.held, self.current, self.closed = most, 0, 0, False
        self.pieces: dict[int, deque] = defaultdict(deque)
        self.changed = threading.Condition()

    def put(self, source: int, piece) -> bool:
        """Whether it was put: a closed shelf takes none."""

        def room() -> bool:
            starved = source == self.current and not self.pieces[source]
            return self.closed or piece is END or self.held < self.most or starved

        with self.changed:
            self.changed.wait_for(room)
            if not self.closed:
                self.pieces[source].append(piece)
                self.held += piece is not END
                self.changed.notify_all()
            return not self.closed

    def take(self, source: int):
        with self.changed:
            self.current = source
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.pieces[source])
            piece = self.pieces[source].popleft()
            self.held -= piece is not END
            self.changed.notify_all()
            return piece

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def ahead(
    sources: Iterable[T], read: Callable[[T], Iterable[U]], threads: int, most: int
) -> Iterator[U]:
    """Yield the pieces that `read` makes of each source, in order. Closing the generator ends the
    threads.

    threads: sources that are read at a time.
    most: pieces that wait to be taken, and one more at times.

    Errors: those of `read`, when its source's turn comes.
    """
    shelf = _Shelf(most)

    def fill(number: int, source: T) -> None:
        try:
            for piece in read(source):
                if not shelf.put(number, piece):
                    return
        finally:
            shelf.put(number, END)

    with ThreadPoolExecutor(threads, "univigu-ahead") as pool:
        try:
            numbered, running = enumerate(sources), deque()
            while True:
                for number, source in numbered:
                    running.append((number, pool.submit(fill, number, source)))
                    if len(running) >= threads + most:
                        break
                if not running:
                    return

                number, reading = running.popleft()
                while (piece := shelf.take(number)) is not END:
                    yield piece
                reading.result()
                del shelf.pieces[number]
        finally:
            shelf.close()
            pool.shutdown(wait=False, cancel_futures=True)
