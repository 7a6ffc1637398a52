"""Scores of AutoQuantize by NVIDIA's own package, compared with those of ``runs/baselines.py``.

    pip install nvidia-modelopt
    python runs/modelopt_check.py MODEL --calib TEXT [--samples 64] [--seq-len 128] [--json]

``auto_quantize`` of the package NVIDIA Model Optimizer scores every group of layers in NVFP4 and
FP8; ``baselines.layer_scores`` scores the sites of the same groups on the same sequences. The rule,
the hooks, the calibration, the FP8 quantizers and the solver are the package's. One piece is
replaced without a GPU: its NVFP4 fake quantizer is a CUDA kernel, and NVFP4 in plain PyTorch takes
its place, with the package's own scales. K must be a multiple of 16.
"""

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from baselines import Parts, layer_scores
from rich.console import Console
from setting import Setting
from torch import Tensor, nn
from transformers.utils import logging

from fgmp import calibration_text
from fgmp.errors import FGMPError, InputError
from fgmp.formats.codec import decode_e4m3, encode_e4m3, round_e2m1
from fgmp.formats.spec import BLOCK, E2M1, UNIT_MAX
from fgmp.model.source import load_model, load_tokenizer

FORMATS = {"fp4": "NVFP4_DEFAULT_CFG", "fp8": "FP8_DEFAULT_CFG"}
"""The package's names of its formats, by ours."""


def nvfp4(inputs: Tensor, block_size: int, amax: Tensor, *_: Any) -> Tensor:
    """Fake-quantize to NVFP4, (..., K): E4M3 block scales over one fp32 scale of the tensor."""
    assert block_size == BLOCK
    t = amax.amax().float() / UNIT_MAX
    blocks = inputs.float().unflatten(-1, (-1, BLOCK))
    scale = decode_e4m3(encode_e4m3(blocks.abs().amax(-1, keepdim=True) / (E2M1.max * t))) * t
    rounded = round_e2m1(blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)) * scale
    return rounded.flatten(-2).to(inputs.dtype)


def auto_quantize(model: nn.Module, samples: Tensor, bits: float) -> dict[str, Any]:
    """State of the package's ``auto_quantize``: ``candidate_stats`` holds the scores.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.quantization import tensor_quant
    except ImportError as error:
        raise InputError(f"this needs nvidia-modelopt: {error}") from error
    if not torch.cuda.is_available():
        tensor_quant.dynamic_block_quantize_op = nvfp4

    def loss(out: Any, batch: Tensor) -> Tensor:
        logits = out.logits[0, :-1].float()
        return nn.functional.cross_entropy(logits, batch[0, 1:], reduction="sum")

    with redirect_stdout(sys.stderr):  # the package prints
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": bits},
            quantization_formats=[getattr(mtq, name) for name in FORMATS.values()],
            disabled_layers=["*lm_head*"],
            data_loader=[sample[None] for sample in samples],
            forward_step=lambda m, batch: m(input_ids=batch, use_cache=False),
            loss_func=loss,
            num_calib_steps=len(samples),
            num_score_steps=len(samples),
        )
    return state


def grouped_scores(state: dict[str, Any], setting: Setting) -> list[dict[str, Any]]:
    """Scores of every group of layers that holds quantized linears, the package's and ours."""
    owner_of = {n: owner for owner, names in Parts(setting).linears_of.items() for n in names}
    scores = layer_scores(setting)
    groups = []
    for stats in state["candidate_stats"].values():
        owners = {owner_of[n] for n in stats["module_names"] if n in owner_of}
        if not owners:
            continue
        by_format = dict(zip(map(str, stats["formats"]), stats["scores"], strict=True))
        group: dict[str, Any] = {"linears": stats["module_names"]}
        for name, label in FORMATS.items():
            (theirs,) = (score for key, score in by_format.items() if key.startswith(label))
            group[name] = {"theirs": float(theirs), "ours": sum(scores[o][name] for o in owners)}
        groups.append(group)
    return groups


def agreement(groups: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Rank correlation of the two scores under a format, and quantiles of ours over theirs."""
    theirs, ours = (torch.tensor([g[name][who] for g in groups]) for who in ("theirs", "ours"))
    ranks = torch.stack([scores.argsort().argsort().double() for scores in (theirs, ours)])
    ratio = (ours / theirs).quantile(torch.tensor([0.0, 0.5, 1.0]))
    return {"rank_correlation": torch.corrcoef(ranks)[0, 1].item(), "ratio": ratio.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--bits", type=float, default=5.4)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(args.model)
    text = calibration_text(
        args.calib, tokenizer, samples=args.samples, seq_len=args.seq_len, seed=0, bos=False
    )
    state = auto_quantize(load_model(args.model).float().eval(), text.samples, args.bits)
    with tempfile.TemporaryDirectory() as folder:
        console = Console(stderr=True)
        setting = Setting(args.model, text, args.seq_len, 0, Path(folder) / "setting", console)
        groups = grouped_scores(state, setting)
    import modelopt

    facts = {
        "model": Path(args.model).name,
        "modelopt": modelopt.__version__,
        "torch": torch.__version__,
        "sequences": len(text.samples),
        "seq_len": args.seq_len,
        "cuda": torch.cuda.is_available(),
        "groups": groups,
        **{name: agreement(groups, name) for name in FORMATS},
    }
    print(json.dumps(facts, indent=1) if args.json else {n: facts[n] for n in FORMATS})


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
