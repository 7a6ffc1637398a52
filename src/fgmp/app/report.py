"""``fgmp report``: gather what a page shows of checkpoints, compute what is asked for, write it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fgmp.app.commands import SILENT, Reporter, compare_models, comparison_inputs
from fgmp.app.records import Comparison, Lines
from fgmp.errors import InputError
from fgmp.evaluation.passages import Passage, changed_passages
from fgmp.pack import checkpoint
from fgmp.report import records
from fgmp.report.blocks import tile_for, total_blocks, window_for
from fgmp.report.comparison import read_comparison
from fgmp.report.gather import gather, weight_shapes
from fgmp.report.page import size, write_page
from fgmp.report.records import Checkpoint, Rows

_PASSAGE_TOKENS = 8192
"""Tokens at the start of the text in which passages are looked for."""


@dataclass(frozen=True)
class Report:
    """Result of ``fgmp report``.

    Attributes:
        report: the HTML file.
        bytes: its size.
        checkpoints: names of the checkpoints on it.
        missing: panels that cannot be drawn, with the reason, by checkpoint.
    """

    report: str
    bytes: int
    checkpoints: list[str]
    missing: dict[str, dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dict(vars(self))

    def lines(self) -> Lines:
        """Labelled lines."""
        return {
            "report": f"{self.report}, {size(self.bytes)}",
            **{
                f"{name}, {panel}": f"not drawn: {reason}"
                for name, reasons in self.missing.items()
                for panel, reason in reasons.items()
            },
        }


@dataclass(frozen=True)
class Measuring:
    """How a page's comparison and passages are computed; options as of ``compare_models``."""

    model: str
    data: str
    seq_len: int | None = None
    bos: bool | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"

    def options(self) -> dict[str, Any]:
        """Options of loading the original."""
        return {"trust_remote_code": self.trust_remote_code, "dtype": self.dtype}


def write_report(
    directories: Sequence[Path],
    output: Path,
    compared: Sequence[Path] = (),
    measuring: Measuring | None = None,
    reporter: Reporter = SILENT,
) -> Report:
    """Write one page on checkpoints.

    Args:
        directories: the checkpoints.
        output: HTML file to write; an older one is replaced.
        compared: outputs of ``fgmp compare --json``, in the order of the checkpoints.
        measuring: what to compute the other comparisons, and passages of text, from; None: neither
            is computed.
        reporter: receives progress and messages.

    Raises:
        InputError, CheckpointError: before anything is computed, if a folder, a file or a target
            cannot be used.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output}: a report must be named *.html")
    if output.is_dir():
        raise InputError(f"{output}: is a folder, not a file")
    checkpoint.require_writable(output)
    if len(compared) > len(directories):
        raise InputError(
            f"compare: at most one file per checkpoint, in their order, got {len(compared)} for "
            f"{len(directories)}"
        )
    rows: list[Rows | None] = [read_comparison(path) for path in compared]
    rows += [None] * (len(directories) - len(rows))
    shapes = [weight_shapes(directory) for directory in directories]
    tile = tile_for(sum(map(total_blocks, shapes)))
    window = window_for(sum(map(len, shapes)))
    names = _names(directories)
    pages = []
    with reporter.progress("reading checkpoints", len(directories)) as advance:
        for name, directory, known in zip(names, directories, rows, strict=True):
            page = gather(directory, tile, window)
            pages.append(replace(page, name=name, comparison=known))
            advance()
    if measuring is not None:
        pages = [
            _measured(page, directory, measuring, reporter)
            for page, directory in zip(pages, directories, strict=True)
        ]
    return finish(output, _title(pages), pages)


def finish(output: Path, title: str, pages: Sequence[Checkpoint]) -> Report:
    """Write the page of gathered checkpoints; says of each what it lacks."""
    pages = [_with_reasons(page) for page in pages]
    write_page(output, title, pages)
    return Report(
        str(output),
        output.stat().st_size,
        [page.name for page in pages],
        {page.name: page.missing for page in pages if page.missing},
    )


def rows_of(comparison: Comparison, data: str) -> Rows:
    """Rows of a comparison that was computed here."""
    return Rows([row.to_dict() for row in comparison.rows], Path(data).name)


def passages_of(
    directory: Path, measuring: Measuring, reporter: Reporter = SILENT
) -> tuple[list[Passage], str]:
    """Passages in which a checkpoint differs most from the original, and what they are from."""
    inputs = comparison_inputs(
        measuring.model,
        directory,
        measuring.data,
        measuring.seq_len,
        reporter,
        measuring.bos,
        **measuring.options(),
    )
    windows = inputs.windows[: max(1, _PASSAGE_TOKENS // inputs.windows.shape[1])]
    passages = changed_passages(
        inputs.source.load(),
        inputs.mixed,
        windows,
        lambda ids: str(inputs.tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
        progress=reporter.progress,
    )
    return passages, (
        f"From the first {windows.numel():,} tokens of {Path(measuring.data).name}, in windows of "
        f"{windows.shape[1]}."
    )


def _measured(
    page: Checkpoint, directory: Path, measuring: Measuring, reporter: Reporter
) -> Checkpoint:
    rows = page.comparison
    if rows is None:
        comparison = compare_models(
            measuring.model,
            directory,
            measuring.data,
            measuring.seq_len,
            reporter,
            measuring.bos,
            **measuring.options(),
        )
        rows = rows_of(comparison, measuring.data)
    passages, source = passages_of(directory, measuring, reporter)
    return replace(page, comparison=rows, passages=passages, passages_source=source)


def _with_reasons(page: Checkpoint) -> Checkpoint:
    missing = dict(page.missing)
    if page.comparison is None:
        missing[records.COMPARISON] = (
            "`fgmp report DIR --model ORIGINAL --data TEXT` computes it, and `--compare FILE` "
            "reads it from a file with the output of `fgmp compare --json`"
        )
    if page.passages is None:
        missing[records.PASSAGES] = (
            "it needs the original and a text: `fgmp report DIR --model ORIGINAL --data TEXT`"
        )
    return replace(page, missing=missing)


def _names(directories: Sequence[Path]) -> list[str]:
    """Different names of folders: the last part of each path, or as many parts as needed."""
    parts = [directory.absolute().parts for directory in directories]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(
        f"checkpoints must be different folders, got {', '.join(map(str, directories))}"
    )


def _title(pages: Sequence[Checkpoint]) -> str:
    return ", ".join(page.name for page in pages)
