"""Texts of the demonstration model as files, for scripts that read files.

    python runs/texts.py DIR

Writes ``docstrings.txt`` (docstrings of the standard library, for calibration) and ``topics.txt``
(the interpreter's language reference, for evaluation). They share no run of ten words; see
``fgmp.demo.text``.
"""

import argparse
from pathlib import Path

from fgmp.demo.text import docstrings, standard_library, topics
from fgmp.documents import SEPARATOR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    documents = docstrings(standard_library())
    (folder / "docstrings.txt").write_text(f"\n{SEPARATOR}\n".join(documents))
    (folder / "topics.txt").write_text(topics())


if __name__ == "__main__":
    main()
