"""The demonstration model's texts as files, for scripts that take files.

    python runs/texts.py DIR

Writes ``docstrings.txt`` (docstrings of the standard library, one document a file, for calibration)
and ``topics.txt`` (the interpreter's language reference, for evaluation). They share no run of ten
words; see ``fgmp.demo.text``.
"""

import sys
from pathlib import Path

from fgmp.data import SEPARATOR
from fgmp.demo.text import docstrings, standard_library, topics


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    documents = docstrings(standard_library())
    (folder / "docstrings.txt").write_text(f"\n{SEPARATOR}\n".join(documents))
    (folder / "topics.txt").write_text(topics())


if __name__ == "__main__":
    main()
