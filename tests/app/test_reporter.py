"""Progress and messages on the terminal."""

import pytest
from transformers.utils import logging

from fgmp.app.reporter import terminal_reporter


def test_messages_go_to_stderr_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Not wrapped, and never markup."""
    text = "warning: [red]" + "word " * 60
    terminal_reporter().message(text)
    out, err = capsys.readouterr()
    assert out == "" and err == text + "\n"


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_reporter().progress("calibrating", 3) as advance:
        for _ in range(3):
            advance()
    out, err = capsys.readouterr()
    assert out == "" and "calibrating" in err and "3/3" in err


def test_bars_of_transformers_are_off() -> None:
    logging.enable_progress_bar()
    terminal_reporter()
    assert not logging.is_progress_bar_enabled()
