"""What a report reads of a checkpoint, and what it says of parts that are missing."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fgmp.errors import CheckpointError, InputError
from fgmp.evaluation.inspect import inspect_checkpoint
from fgmp.report import records
from fgmp.report.blocks import WINDOW
from fgmp.report.gather import gather, weight_shapes
from fgmp.report.records import Checkpoint

Copy = Callable[[str], Path]


def read(folder: Path) -> Checkpoint:
    return gather(folder, 1, WINDOW)


def test_numbers_are_those_of_inspect(folder: Path) -> None:
    page, facts = read(folder), inspect_checkpoint(folder)
    assert page.name == "tiny"
    assert page.bits_per_weight == facts.bits_per_weight.planes
    assert page.plane_bytes == facts.bytes.planes and page.file_bytes == facts.file_bytes
    assert 1 - page.fp4_weights == pytest.approx(facts.fp8_share.weights)
    shares = {m.facts.name: m.facts.fp8_share for m in page.matrices}
    assert shares == facts.fp8_share.by_linear
    assert {s.owner: s.fp8_share for s in page.sites} == facts.fp8_share.activations_by_site
    assert weight_shapes(folder) == [(m.facts.n, m.facts.k) for m in page.matrices]
    assert list(page.missing) == []


def test_maps_have_the_fp8_blocks(folder: Path) -> None:
    for matrix in read(folder).matrices:
        bits = np.unpackbits(np.frombuffer(zlib.decompress(matrix.blocks.data), np.uint8))
        assert int(bits.sum()) == matrix.facts.fp8_blocks


def test_two_sentences_say_what_was_done(folder: Path) -> None:
    first, second = read(folder).sentences
    assert "of the matrix weights now take 6.16 bits each on average instead of 32" in first
    assert "70% of the weights and 70% of the values" in second


def test_facts_on_the_run(copied: Copy) -> None:
    folder = copied("other")
    run = json.loads((folder / "fgmp_run.json").read_text())
    run["source"] = {"model": "org/name", "command": "fgmp quantize org/name -o out"}
    run["versions"] = {"python": "3.11.7", "torch": "2.13.0"}
    (folder / "fgmp_run.json").write_text(json.dumps(run))
    facts = read(folder).facts
    assert facts["model"] == "org/name"
    assert facts["command line"] == "fgmp quantize org/name -o out"
    assert facts["versions"] == "python 3.11.7, torch 2.13.0"
    assert facts["calibration set"] == "8 sequences"
    assert facts["seed"] == "0" and facts["policy and rule"] == "fisher, benefit"


@pytest.mark.parametrize("content", [None, "[]", "{", "\x00"])
def test_without_measurements_of_the_run(content: str | None, copied: Copy) -> None:
    folder = copied("other")
    (folder / "fgmp_run.json").unlink()
    if content is not None:
        (folder / "fgmp_run.json").write_text(content)
    page = read(folder)
    assert "no readable fgmp_run.json" in page.missing[records.RUN]
    assert "command line" not in page.facts and page.matrices


def test_values_of_any_type_are_text(copied: Copy) -> None:
    folder = copied("other")
    content = {"source": 3, "versions": ["x"], "seconds": {"total": "<b>"}, "peak_bytes": None}
    (folder / "fgmp_run.json").write_text(json.dumps(content))
    assert not {"model", "versions", "time", "peak memory"} & read(folder).facts.keys()
    (folder / "fgmp_run.json").write_text(json.dumps({"source": {"model": "x" * 1000}}))
    assert read(folder).facts["model"] == "x" * 400 + "... (1,000 characters)"


def test_without_scores(copied: Copy) -> None:
    folder = copied("other")
    (folder / "fgmp_scores.json").write_text('{"version": 2}')
    page = read(folder)
    assert page.scores is None and "version must be 1, got 2" in page.missing[records.SCORES]
    (folder / "fgmp_scores.json").unlink()
    page = read(folder)
    assert page.scores is None and "has no fgmp_scores.json" in page.missing[records.SCORES]
    assert page.matrices and page.energy


def test_a_quantizer_of_unknown_energy(copied: Copy) -> None:
    folder = copied("other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["recipe"]["sensitivities"] = "powers"
    (folder / "config.json").write_text(json.dumps(config))
    known = read(folder)
    config["quantization_config"]["recipe"]["sensitivities"] = ["<b>"]  # taken for the default
    (folder / "config.json").write_text(json.dumps(config))
    assert known.energy or "energies are known of" in known.missing[records.ENERGY]
    assert read(folder).energy


def test_other_folders_are_refused(tmp_path: Path, copied: Copy) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        read(tmp_path)
    folder = copied("damaged")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC-32"):
        read(folder)


def test_another_arithmetic_is_refused(copied: Copy) -> None:
    folder = copied("edited")
    config = json.loads((folder / "config.json").read_text())
    for site in config["quantization_config"]["sites"].values():
        site["rule"] = "difference"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="sites must be as written"):
        read(folder)
