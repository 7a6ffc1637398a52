"""Progress of long work: a stage has a title, a number of steps and a function that advances it.

The library calls ``progress(title, steps)`` and enters the context manager that it returns, which
yields the function. Callers pass :func:`bars` for progress bars, :func:`silent` for none.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from rich import progress as rich_progress
from rich.console import Console

Advance = Callable[[], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextlib.contextmanager
def silent(title: str, steps: int) -> Iterator[Advance]:
    """Report nothing."""
    yield lambda: None


def bars(console: Console) -> Progress:
    """Report on a console, one bar a stage."""

    @contextlib.contextmanager
    def stage(title: str, steps: int) -> Iterator[Advance]:
        columns = (
            rich_progress.TextColumn("{task.description:<28}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeRemainingColumn(elapsed_when_finished=True),
        )
        with rich_progress.Progress(*columns, console=console) as display:
            task = display.add_task(title, total=steps)
            yield lambda: display.advance(task)

    return stage
