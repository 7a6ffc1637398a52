"""The model card of a checkpoint: README.md with the hub's YAML header.

``fgmp quantize`` writes it, ``fgmp compare`` replaces what stands between two markers. Text outside
of them is the user's to change. A README.md without the markers, or behind a link, belongs to
somebody else and stays as it is.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from fgmp.errors import InputError
from fgmp.formats.spec import FP4_BITS, FP8_BITS
from fgmp.pack.checkpoint import CARD, CheckpointConfig
from fgmp.pack.folder import require_regular
from fgmp.report.comparison import MODELS, cell, columns_of
from fgmp.storage.atomic import replacing

START, END = "<!-- fgmp results start -->", "<!-- fgmp results end -->"
"""Markers around the results."""

_LARGEST = 1 << 20
"""Bytes of a card that is read."""

_LICENSE_KEYS = ("license", "license_name", "license_link")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_PLAIN = re.compile(r"[\w.:/ +#-]{1,200}", re.ASCII)

_NO_RESULTS = "Not measured yet. `fgmp compare ORIGINAL DIR --data TEXT` writes its results here."


def source_metadata(card: Path | None) -> dict[str, str]:
    """The licence that a model's card names: ``license``, ``license_name`` and ``license_link``.

    Args:
        card: README.md of the original model, or None. Without a readable header, nothing is known.
    """
    if card is None:
        return {}
    try:
        require_regular(card)
        with card.open("rb") as file:
            text = file.read(_LARGEST).decode(errors="replace")
        match = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
        header = yaml.safe_load(match[1]) if match else None
    except (InputError, OSError, RecursionError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(header, dict):
        return {}
    values = {key: header.get(key) for key in _LICENSE_KEYS}
    return {k: v for k, v in values.items() if isinstance(v, str) and _PLAIN.fullmatch(v)}


def model_card(config: CheckpointConfig, model_name: str, metadata: Mapping[str, str]) -> str:
    """Text of a new card, the same for equal inputs.

    Args:
        config: configuration of the quantized model.
        model_name: folder or hub name of the original.
        metadata: see :func:`source_metadata`.
    """
    local = Path(model_name).is_dir() or not _HUB_NAME.fullmatch(model_name)
    name = Path(model_name).absolute().name if local else model_name
    header: dict[str, Any] = dict(metadata)
    if not local:
        header |= {"base_model": model_name, "base_model_relation": "quantized"}
    header |= {
        "library_name": "fgmp",
        "pipeline_tag": "text-generation",
        "tags": ["fgmp", "nvfp4", "fp8", "mixed-precision", "quantized"],
    }
    result, calibration = config.result, config.calibration
    activations = result["fp4_activations"]
    recipe = yaml.safe_dump(config.recipe, sort_keys=False, allow_unicode=True).strip()
    unquantized = ", ".join(f"`{_plain(n)}`" for n in result.get("unquantized", [])) or "none"
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}
---

# {_markdown(name)}, quantized by fgmp

Weights and activations of the linear layers are a mix of NVFP4 and FP8, chosen for every block of
16 values by its estimated effect on the loss.

| | blocks in NVFP4 | bits per value |
|---|---|---|
| weights | {result["fp4_weights"]:.1%} | {result["bits_per_weight"]:.3f} as stored |
| activations | {activations:.1%} at calibration | {_bits(activations)} |

Quantized are {result["quantized_share"]:.1%} of the parameters of matrix products; not quantized:
{unquantized}.

## Load

```python
import fgmp

model = fgmp.load("DIR")
```

`DIR` is this folder. After `import fgmp`, `AutoModelForCausalLM.from_pretrained` loads it, too;
without it Transformers would initialize the weights randomly.

## Serve

```
fgmp serve DIR --port 8000
```

serves it by vLLM with an OpenAI-compatible interface. `fgmp inspect DIR` checks every byte, and
`fgmp report DIR -o report.html` shows where the bits are.

## Results

{START}
{_NO_RESULTS}
{END}

## Recipe

Calibrated on {_markdown(str(calibration.get("text")))}: {calibration.get("sequences")} sequences of
{calibration.get("seq_len")} tokens.

```yaml
{recipe}
```
"""


def _bits(fp4_fraction: float) -> str:
    return f"{FP4_BITS * fp4_fraction + FP8_BITS * (1 - fp4_fraction):.3f}"


def update_card(directory: Path, rows: Sequence[Mapping[str, Any]], about: str) -> str | None:
    """Replace the results in a checkpoint's card.

    Args:
        directory: the checkpoint.
        rows: of the comparison.
        about: a sentence on text and program.

    Returns:
        Why the card was left as it is; None if it was updated, or if there is none.
    """
    path = directory / CARD
    if not path.exists() and not path.is_symlink():
        return None
    if path.is_symlink() or not path.is_file():
        return f"{path}: is no regular file, left as it is"
    try:
        raw = path.read_bytes()
        text = raw.decode()
        if len(raw) > _LARGEST:
            return f"{path}: has {len(raw):,} bytes, left as it is"
        before, start, rest = text.partition(START)
        _, end, after = rest.partition(END)
        if not (start and end) or START in rest or END in before or END in after:
            return f"{path}: has no section of fgmp results, left as it is"
        with replacing(path) as draft:
            new = f"{before}{START}\n{results(rows, about)}\n{END}{after}"
            draft.write_bytes(new.encode())
            shutil.copymode(path, draft)
    except (OSError, UnicodeError) as error:
        return f"{path}: could not be updated: {error}"
    return None


def results(rows: Sequence[Mapping[str, Any]], about: str) -> str:
    """Rows of a comparison as a Markdown table, with a sentence on their origin."""
    plain = [dict(row) for row in rows]
    columns = columns_of(plain)
    lines = ["| " + " | ".join(_markdown(c.label) for c in columns.values()) + " |"]
    lines.append("|" + "---|" * len(columns))
    for row in plain:
        cells = [cell(row.get(key), column).text for key, column in columns.items()]
        lines.append("| " + " | ".join(map(_markdown, cells)) + " |")
    known = [f"`{row['name']}`: {MODELS[row['name']]}" for row in plain if row["name"] in MODELS]
    sentences = [_markdown(about, code=True), "; ".join(known) + "." if known else ""]
    return "\n".join([*lines, "", *filter(None, sentences)])


def _plain(text: str) -> str:
    """Printable text without backticks, for code in a line."""
    return "".join(c for c in text if c.isprintable() and c != "`")


def _markdown(text: str, *, code: bool = False) -> str:
    """Text that Markdown shows as it is; ``code`` keeps backticks."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    special = r"([\\*_{}\[\]|#!~])" if code else r"([\\`*_{}\[\]|#!~])"
    return re.sub(special, r"\\\1", escape(printable, quote=False))
