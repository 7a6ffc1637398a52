"""The scores of AutoQuantize by NVIDIA's own package, beside those of ``runs/baselines.py``.

    pip install nvidia-modelopt
    python runs/modelopt_check.py MODEL --calib TEXT [--samples 64] [--seq-len 128] [--json]

``auto_quantize`` of the package NVIDIA Model Optimizer scores every group of layers in NVFP4 and
FP8; our ``layer_scores`` scores the sites of the same groups on the same sequences. Where there is
no GPU one piece of the package is replaced: its NVFP4 fake quantizer is a CUDA kernel, and NVFP4 in
plain PyTorch takes its place, by the package's own scales. The rule, the hooks, the calibration,
the FP8 quantizers and the solver are the package's. K must be a multiple of 16.
"""

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import baselines
import modelopt
import modelopt.torch.quantization as mtq
import torch
from accuracy import Setting
from modelopt.torch.quantization import tensor_quant
from rich.console import Console
from torch import Tensor, nn
from transformers.utils import logging

from fgmp import calibration_text
from fgmp.formats.codec import decode_e4m3, encode_e4m3, round_e2m1
from fgmp.formats.spec import BLOCK, E2M1, UNIT_MAX
from fgmp.model.source import load_model, load_tokenizer

FORMATS = {"fp4": "NVFP4_DEFAULT_CFG", "fp8": "FP8_DEFAULT_CFG"}
"""The package's names of its formats by ours."""


def nvfp4(inputs: Tensor, block_size: int, amax: Tensor, *_: Any) -> Tensor:
    """NVFP4 and back, (..., K): E4M3 block scales over one fp32 scale of the tensor."""
    assert block_size == BLOCK
    t = amax.amax().float() / UNIT_MAX
    blocks = inputs.float().unflatten(-1, (-1, BLOCK))
    scale = decode_e4m3(encode_e4m3(blocks.abs().amax(-1, keepdim=True) / (E2M1.max * t))) * t
    rounded = round_e2m1(blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)) * scale
    return rounded.flatten(-2).to(inputs.dtype)


def theirs(model: nn.Module, samples: Tensor, bits: float) -> dict[str, Any]:
    """``auto_quantize``'s state: ``candidate_stats`` holds the scores."""
    if not torch.cuda.is_available():
        tensor_quant.dynamic_block_quantize_op = nvfp4

    def loss(out: Any, batch: Tensor) -> Tensor:
        logits = out.logits[0, :-1].float()
        return nn.functional.cross_entropy(logits, batch[0, 1:], reduction="sum")

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


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


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
        args.calib, tokenizer, samples=args.samples, seq_len=args.seq_len, seed=0
    )
    with redirect_stdout(sys.stderr):  # the package prints
        state = theirs(load_model(args.model).float().eval(), text.samples, args.bits)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            args.model,
            text,
            args.seq_len,
            0,
            Path(folder) / "calibration.safetensors",
            Console(stderr=True),
        )
        parts = baselines.Parts(setting)
        scores = baselines.layer_scores(parts, text.samples)
    owner_of = {n: owner for owner, names in parts.linears_of.items() for n in names}
    rows = []
    for group in state["candidate_stats"].values():
        owners = {owner_of[n] for n in group["module_names"] if n in owner_of}
        if not owners:
            continue
        found = dict(zip(map(str, group["formats"]), group["scores"], strict=True))
        row: dict[str, Any] = {"linears": group["module_names"]}
        for name, label in FORMATS.items():
            (own,) = (score for shown, score in found.items() if shown.startswith(label))
            row[name] = {"theirs": float(own), "ours": sum(scores[o][name] for o in owners)}
        rows.append(row)
    facts = {
        "model": Path(args.model).name,
        "modelopt": modelopt.__version__,
        "torch": torch.__version__,
        "sequences": len(text.samples),
        "seq_len": args.seq_len,
        "cuda": torch.cuda.is_available(),
        "groups": rows,
    }
    for name in FORMATS:
        a, b = (torch.tensor([r[name][who] for r in rows]) for who in ("theirs", "ours"))
        ratio = b / a
        facts[name] = {
            "rank_correlation": torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item(),
            "ratio": [q.item() for q in ratio.quantile(torch.tensor([0.0, 0.5, 1.0]))],
        }
    print(json.dumps(facts, indent=1) if args.json else {n: facts[n] for n in FORMATS})


if __name__ == "__main__":
    sys.exit(main())
