"""Records: a comparison's rows by name."""

from fgmp.report.records import Rows


def test_rows_by_name() -> None:
    rows = Rows([{"name": "fp8", "kl": 1.0}, {"name": "fgmp"}], "a file")
    assert rows.named("fp8") == {"name": "fp8", "kl": 1.0}
    assert rows.named("original") is None
