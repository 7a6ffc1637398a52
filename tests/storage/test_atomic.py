"""A file is written whole or not at all."""

from pathlib import Path

import pytest

from fgmp.storage.atomic import replacing


def test_what_was_there_stays_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    with replacing(path) as draft:
        draft.write_text("1")
        assert not path.exists()
    assert path.read_text() == "1"
    with replacing(path) as draft:
        draft.write_text("2")
        assert path.read_text() == "1"
    assert path.read_text() == "2"
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_an_error_nothing_has_changed(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "state.tmp").write_text("another's")
    path = tmp_path / "state.safetensors"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as draft:
        draft.write_text("half")
        raise error
    assert path.read_text() == "old" and (tmp_path / "state.tmp").read_text() == "another's"
    assert len(list(tmp_path.iterdir())) == 2
