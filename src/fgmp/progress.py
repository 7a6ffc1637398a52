"""How long work reports on itself: a stage with a title, a number of steps and an advance call.

The library calls ``progress(title, steps)`` and uses the context manager it gets; who wants bars
passes :func:`bars`, who wants silence passes nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[], None]
Stages = Callable[[str, int], AbstractContextManager[Advance]]


@contextlib.contextmanager
def silent(title: str, steps: int) -> Iterator[Advance]:
    """Report nothing."""
    yield lambda: None


def bars(console: Console) -> Stages:
    """Report on a console, one bar a stage."""

    @contextlib.contextmanager
    def stage(title: str, steps: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=steps)
            yield lambda: progress.advance(task)

    return stage
