"""Fixtures of the commands' tests: a folder to work in, and a command line in this process."""

import sys

import pytest

from fgmp.app.cli import main

from .cases import SMALL, TEXT, Done, Place, Run, a_model, a_tokenizer


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    a_model().save_pretrained(folder / "model")
    a_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    place = Place(*(str(folder / name) for name in ("model", "checkpoint", "text.txt")))
    quantize = ["quantize", place.model, "-o", place.checkpoint, "--calib", place.text, *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fgmp", *quantize, "--json"])
        with pytest.raises(SystemExit, match="0"):
            main()
    return place


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; file descriptors are caught, so that libraries cannot print past it."""

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["fgmp", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return call
