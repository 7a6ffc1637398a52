"""Build the documentation as a site: python scripts/docs_site.py OUT; needs pip install '.[docs]'.

The site has the documents of ``docs`` and pages that are made from other files:

    index          README.md, and the contents
    contributing   CONTRIBUTING.md
    changelog      CHANGELOG.md
    cli            the help of every command, from the program itself
    api            docstrings of the public names of the package

Links to files of the repository that are not part of the site become plain text. A warning of
Sphinx, such as a link without a target, is an error.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

COPIED = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Files of the repository by the page that shows them."""

CONTENTS = {
    "Using it": ["choosing", "report", "tasks", "serving", "export", "questions"],
    "How it works": ["method", "extending", "architecture"],
    "Results": ["results", "accuracy", "ablations", "measurements", "reliability", "families"],
    "Specifications": ["numerics", "format", "kernels", "hardware", "energy"],
    "Reference": ["cli", "api", "contributing", "changelog"],
}
"""Pages by chapter; a document that is in none of them is an error."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def build(target: Path) -> None:
    """Write the site to a folder, replacing it.

    Raises:
        subprocess.CalledProcessError: Sphinx refused; its message is on standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "docs"
        shutil.copytree(ROOT / "docs", source)
        for page, name in COPIED.items():
            (source / page).write_text((ROOT / name).read_text("utf-8"), "utf-8")
        (source / "api.md").write_text(api(), "utf-8")
        for page in source.glob("*.md"):
            page.write_text(relinked(page.read_text("utf-8"), source), "utf-8")
        with (source / "index.md").open("a", encoding="utf-8") as index:
            index.write(contents())
        (source / "cli.md").write_text(command_line(), "utf-8")
        shutil.rmtree(target, ignore_errors=True)
        options = ["-b", "html", "-W", "--keep-going", "-q", "-d", str(Path(folder) / "trees")]
        sphinx = [sys.executable, "-m", "sphinx", *options, str(source), str(target)]
        subprocess.run(sphinx, check=True)


def relinked(markdown: str, source: Path) -> str:
    """Text of a page whose links point at pages, as seen from ``source``."""
    pages = {name: page for page, name in COPIED.items()}

    def link(match: re.Match[str]) -> str:
        image, text, path, anchor = match[1], match[2], match[3], match[4] or ""
        if ":" in path:
            return match[0]
        path = path.removeprefix("docs/").removeprefix("../")
        path = pages.get(path, path)
        return f"{image}[{text}]({path}{anchor})" if (source / path).is_file() else text

    return _LINK.sub(link, markdown)


def contents() -> str:
    """Sphinx's tables of contents."""
    blocks = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {chapter}", "", *pages, "```"])
        for chapter, pages in CONTENTS.items()
    ]
    return "\n\n" + "\n\n".join(blocks) + "\n"


def api() -> str:
    """The page of the public names."""
    import fgmp

    entries = []
    for name in fgmp.__all__:
        kind = "autoclass" if isinstance(getattr(fgmp, name), type) else "autofunction"
        entries.append(f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: fgmp.{name}\n```")
    return "\n\n".join(["# Python", "What `import fgmp` offers.", *entries]) + "\n"


def command_line() -> str:
    """The page of all commands."""
    import typer
    from typer.main import get_command

    from fgmp.app.cli import app

    command = get_command(app)
    context = typer.Context(command, info_name="fgmp")
    return "\n".join(["# Command line", "", *_describe(command, context)]) + "\n"


def _describe(command: Any, context: Any) -> Iterator[str]:
    """Help of a command and of its subcommands, as Markdown."""
    if context.parent is not None:
        yield f"## `{context.command_path}`\n"
    yield f"{_paragraphs(command.help)}\n"
    rows = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
    if rows and not hasattr(command, "commands"):
        yield "| option | meaning |\n|---|---|"
        for names, text in rows:
            yield f"| `{_cell(names)}` | {_cell(text)} |"
        yield ""
    for name, sub in getattr(command, "commands", {}).items():
        if not sub.hidden:
            yield from _describe(sub, type(context)(sub, info_name=name, parent=context))


def _paragraphs(text: str | None) -> str:
    paragraphs = re.split(r"\n\s*\n", (text or "").strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    try:
        build(args.target)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
