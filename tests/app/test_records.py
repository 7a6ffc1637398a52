"""Results of the commands: their JSON keys, which are stable, and their labelled lines."""

import json
from pathlib import Path
from typing import Any

import pytest

from fgmp.app.records import (
    CacheUse,
    Comparison,
    Coverage,
    Evaluation,
    Generation,
    Online,
    QuantizeSummary,
    Quickstart,
    inspection_lines,
)
from fgmp.assign.frontier import Fractions
from fgmp.evaluation.compare import Row
from fgmp.evaluation.inspect import ByLayout, Fp8Shares, Inspection

COVERAGE = Coverage(0.9375, ["lm_head.weight"])

SUMMARY = QuantizeSummary(
    output="out",
    fp4_fraction=Fractions(0.7, 0.8),
    coverage=COVERAGE,
    bits_per_weight=5.6257,
    bytes=1_234_567,
    tensor_bytes=1_230_000,
    budget={},
    clip={"used": True, "held_out_nll": {}, "held_out_kl": {}},
    uniform={"used": False, "held_out_nll": {}, "held_out_kl": {}},
    tune={},
    seconds=61.24,
    peak_bytes=1_500_000_000,
)

ONLINE = Online(
    saturated=1234,
    drift={"a": 0.01, "b": -0.025, "c": 0.0},
    calibration_overlap=0.125,
    coverage=COVERAGE,
)

CACHE = CacheUse("nvfp4", 18.0169, 64)

ROW = Row("fgmp", 10.0, (9.5, 10.5), 0.02, 0.3, 91.0, 5.6, 5.7, 2.9, 0.7, 1.2, None, 71.0)

INSPECTION = Inspection(
    path="out",
    tensors=58,
    file_bytes=1_234_567,
    linears=7,
    quantized_weights=11_264,
    fp8_share=Fp8Shares(
        0.3, {"0": 0.3}, {"mlp.up_proj": 0.3}, {"l.0.mlp.up_proj": 0.3}, {"s": 0.2}
    ),
    bits_per_weight=ByLayout(5.625, 5.5625),
    bytes=ByLayout(7920, 7832),
    unquantized=["lm_head.weight"],
    quantized_share=0.9375,
    recipe={"fp4": 0.7},
    calibration={"sequences": 6},
    clip=None,
    tune={},
)

TUNE = {"used": True, "held_out_kl": {"without": 0.02345, "with": 0.01987}}


def as_json(record: Any) -> dict[str, Any]:
    """What ``--json`` prints, read again."""
    result: dict[str, Any] = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    return result


def test_quantize_keys() -> None:
    assert as_json(SUMMARY) == {
        "output": "out",
        "fp4_fraction": {"weights": 0.7, "activations": 0.8},
        "quantized_share": 0.9375,
        "unquantized": ["lm_head.weight"],
        "bits_per_weight": 5.6257,
        "bytes": 1_234_567,
        "tensor_bytes": 1_230_000,
        "budget": {},
        "clip": {"used": True, "held_out_nll": {}, "held_out_kl": {}},
        "uniform": {"used": False, "held_out_nll": {}, "held_out_kl": {}},
        "tune": {},
        "seconds": 61.24,
        "peak_bytes": 1_500_000_000,
    }


def test_quantize_lines() -> None:
    assert SUMMARY.lines() == {
        "checkpoint": "out",
        "FP4 blocks": "70.0% of weights, 80.0% of activations",
        "bits per weight": "5.626",
        "size": "1,234,567 bytes, tensors 1,230,000",
        "quantized": "93.8% of matmul parameters; not: lm_head.weight",
        "clipping": "on",
        "time": "61.2 s",
        "peak memory": "1.50 GB",
    }


def changed(**values: Any) -> QuantizeSummary:
    return QuantizeSummary(**{**vars(SUMMARY), **values})


@pytest.mark.parametrize(
    ("budget", "label", "text"),
    [
        ({"bits": 5.5}, "budget", "5.500 bits, mean of weights and activations"),
        ({"energy_percent": 74.96}, "energy", "75.0% of all-FP8's"),
        (
            {"increase_percent": 0.8, "increase_low": -0.1, "increase_high": 1.7},
            "increase",
            "+0.80% perplexity on held-out text relative to all-FP8 (-0.10% to +1.70%)",
        ),
    ],
)
def test_lines_of_a_budget(budget: dict[str, float], label: str, text: str) -> None:
    lines = changed(budget=budget).lines()
    assert lines[label] == text
    assert len(lines) == len(SUMMARY.lines()) + 1


@pytest.mark.parametrize(("used", "start"), [(True, "KL on"), (False, "not used: KL on")])
def test_lines_of_tuning(used: bool, start: str) -> None:
    text = changed(tune={**TUNE, "used": used}).lines()["tuning"]
    assert text == f"{start} held-out text 0.02345 without, 0.01987 with"


def test_lines_without_clipping() -> None:
    assert changed(clip={"used": False}).lines()["clipping"] == "off"


def test_coverage_in_words() -> None:
    assert str(COVERAGE) == "93.8% of matmul parameters; not: lm_head.weight"
    assert str(Coverage(1.0, [])) == "100.0% of matmul parameters; not: none"
    assert str(Coverage(None, [])) == "the checkpoint does not say"


PLAIN = {
    "perplexity": 12.5,
    "nll": 2.525729,
    "tokens": 3717,
    "fp4_activations": None,
    "bos": False,
}


def test_eval_keys() -> None:
    """A model that is not quantized, with a packed KV cache, and a quantized one."""
    plain = Evaluation(**PLAIN)
    assert as_json(plain) == PLAIN
    cache = {"kv_cache": "nvfp4", "kv_bytes_per_token": 18.0169, "kv_bytes_per_token_bf16": 64}
    assert as_json(Evaluation(**PLAIN, cache=CACHE)) == PLAIN | cache
    online = {
        "saturated": 1234,
        "drift": {"a": 0.01, "b": -0.025, "c": 0.0},
        "calibration_overlap": 0.125,
        "quantized_share": 0.9375,
        "unquantized": ["lm_head.weight"],
    }
    quantized = Evaluation(**{**PLAIN, "fp4_activations": 0.7}, online=ONLINE)
    assert as_json(quantized) == PLAIN | {"fp4_activations": 0.7} | online
    both = Evaluation(**PLAIN, cache=CACHE, online=ONLINE)
    assert as_json(both) == PLAIN | cache | online


def test_eval_lines() -> None:
    """Without drift of every site: the furthest is named, by size and not by sign."""
    common = {"perplexity": "12.5", "nll": "2.52573", "tokens": "3,717"}
    assert Evaluation(**PLAIN).lines() == common
    quantized = Evaluation(**{**PLAIN, "fp4_activations": 0.7}, cache=CACHE, online=ONLINE)
    assert quantized.lines() == {
        **common,
        "fp4 activations": "70.0% of blocks",
        "kv cache": "nvfp4",
        "kv bytes per token": "18.0169",
        "kv bytes per token bf16": "64",
        "saturated": "1,234",
        "calibration overlap": "12.5% of windows",
        "furthest from calibration": "b, -2.5 points of FP4",
        "quantized": str(COVERAGE),
    }


def test_lines_of_a_checkpoint_that_knows_less() -> None:
    """No digest of the calibration text, and no site that saw a token."""
    online = Online(0, {}, None, Coverage(None, []))
    assert online.lines() == {"saturated": "0", "quantized": "the checkpoint does not say"}


def test_compare_keys() -> None:
    assert as_json(Comparison([ROW], COVERAGE, 0.0)) == {
        "rows": [
            {
                "name": "fgmp",
                "perplexity": 10.0,
                "ci95": [9.5, 10.5],
                "kl": 0.02,
                "kl_p99": 0.3,
                "top1_agreement_percent": 91.0,
                "bits_per_weight": 5.6,
                "bits_per_activation": 5.7,
                "compression": 2.9,
                "fp4_activations": 0.7,
                "vs_fp8_percent": 1.2,
                "gap_recovered_percent": None,
                "kl_gap_recovered_percent": 71.0,
            }
        ],
        "quantized_share": 0.9375,
        "unquantized": ["lm_head.weight"],
        "calibration_overlap": 0.0,
        "bos": False,
        "uniform_absent": None,
    }
    assert Comparison([ROW], COVERAGE).lines() == {"quantized": str(COVERAGE)}
    without = Comparison([ROW], COVERAGE, uniform_absent="absent: a reason")
    assert (
        without.lines()["row uniform"] == as_json(without)["uniform_absent"] == "absent: a reason"
    )


def test_windows_with_bos_are_shown() -> None:
    line = "each starts with the beginning-of-sequence token"
    for result in (Evaluation(**{**PLAIN, "bos": True}), Comparison([ROW], COVERAGE, bos=True)):
        assert as_json(result)["bos"] is True and result.lines()["windows"] == line


def test_generate_keys() -> None:
    plain = {"text": " brown fox", "tokens": 10, "tokens_per_second": 123.4}
    assert as_json(Generation(**plain)) == plain  # type: ignore[arg-type]
    cached = as_json(Generation(**plain, cache=CACHE))  # type: ignore[arg-type]
    assert cached == plain | {
        "kv_cache": "nvfp4",
        "kv_bytes_per_token": 18.0169,
        "kv_bytes_per_token_bf16": 64,
    }


def test_quickstart_keys_and_lines() -> None:
    comparison = Comparison([ROW], COVERAGE)
    result = Quickstart(
        Path("out"), Path("out/checkpoint"), Path("out/report.html"), 240.4, SUMMARY, comparison
    )
    assert as_json(result) == {
        "output": "out",
        "checkpoint": "out/checkpoint",
        "report": "out/report.html",
        "seconds": 240.4,
        "summary": as_json(SUMMARY),
        "rows": as_json(comparison)["rows"],
    }
    added = {"report": "out/report.html", "whole run": "240 s"}
    assert result.lines() == SUMMARY.lines() | added


def test_inspect_keys() -> None:
    assert as_json(INSPECTION) == {
        "path": "out",
        "tensors": 58,
        "file_bytes": 1_234_567,
        "linears": 7,
        "quantized_weights": 11_264,
        "fp8_share": {
            "weights": 0.3,
            "by_layer": {"0": 0.3},
            "by_kind": {"mlp.up_proj": 0.3},
            "by_linear": {"l.0.mlp.up_proj": 0.3},
            "activations_by_site": {"s": 0.2},
        },
        "bits_per_weight": {"planes": 5.625, "streamed_image": 5.5625},
        "bytes": {"planes": 7920, "streamed_image": 7832},
        "unquantized": ["lm_head.weight"],
        "quantized_share": 0.9375,
        "recipe": {"fp4": 0.7},
        "calibration": {"sequences": 6},
        "clip": None,
        "tune": {},
    }


def test_inspect_lines() -> None:
    assert inspection_lines(INSPECTION) == {
        "checkpoint": "out",
        "integrity": "58 tensors, 1,234,567 bytes verified",
        "linears": "7, 11,264 weights",
        "planes": "5.625 bits per weight, 7,920 bytes",
        "streamed image": "5.562 bits per weight, 7,832 bytes",
        "quantized": str(COVERAGE),
    }
