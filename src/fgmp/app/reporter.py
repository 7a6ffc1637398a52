"""Progress bars and messages of a command on the terminal."""

from typing import TYPE_CHECKING

from fgmp.app.console import printable, stderr
from fgmp.progress import bars

if TYPE_CHECKING:
    from fgmp.app.commands import Reporter


def terminal_reporter() -> "Reporter":
    """Reports on stderr; switches off Transformers' own bars."""
    from transformers.utils import logging

    from fgmp.app.commands import Reporter

    logging.disable_progress_bar()

    def message(text: str) -> None:
        stderr.print(printable(text), highlight=False, soft_wrap=True)

    return Reporter(progress=bars(stderr), message=message)
