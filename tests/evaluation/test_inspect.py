"""What ``fgmp inspect`` counts, and that no byte of a checkpoint changes unnoticed."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

import fgmp
from fgmp import Recipe
from fgmp.errors import FGMPError
from fgmp.evaluation.inspect import LinearFacts, _shares, inspect_checkpoint
from fgmp.model.linear import mixed_linears
from fgmp.model.store import config_of
from fgmp.pack.checkpoint import RUN
from fgmp.pack.checksums import FILES as FILE_CHECKSUMS
from fgmp.pack.checksums import FILES_LIST as LIST_CHECKSUM
from fgmp.pack.stream import to_image

RECIPE = Recipe(clip="off", compensate=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "checkpoint"
    tokens = torch.randint(128, (8, 24), generator=torch.Generator().manual_seed(1))
    fgmp.save(fgmp.quantize(make_model("llama"), tokens, RECIPE), folder)
    return folder


def test_inspection(checkpoint: Path) -> None:
    model = fgmp.load(checkpoint)
    inspection = inspect_checkpoint(str(checkpoint))
    linears = mixed_linears(model)
    assert inspection.path == str(checkpoint) and inspection.linears == 14
    elements = sum(m.packed.n * m.packed.k for m in linears.values())
    assert inspection.quantized_weights == elements
    flags = {name: m.packed.is_fp8() for name, m in linears.items()}
    shares = inspection.fp8_share
    assert shares.by_linear == {
        n: pytest.approx(f.double().mean().item()) for n, f in flags.items()
    }
    everything = torch.cat([f.flatten() for f in flags.values()])
    assert shares.weights == pytest.approx(everything.double().mean().item())
    assert list(shares.by_layer) == ["0", "1"]
    first = torch.cat([f.flatten() for n, f in flags.items() if ".layers.0." in n])
    assert shares.by_layer["0"] == pytest.approx(first.double().mean().item())
    queries = torch.cat([f.flatten() for n, f in flags.items() if n.endswith("q_proj")])
    assert shares.by_kind["self_attn.q_proj"] == pytest.approx(queries.double().mean().item())
    assert inspection.bytes.planes == sum(m.packed.nbytes for m in linears.values())
    images = sum(len(to_image(m.packed)) for m in linears.values())
    assert inspection.bytes.streamed_image == images
    assert inspection.bits_per_weight.streamed_image == pytest.approx(8 * images / elements)
    assert inspection.unquantized == ["lm_head.weight"]
    assert inspection.recipe == RECIPE.to_dict()
    config = config_of(model)
    assert shares.activations_by_site == {n: 1 - s.fp4_fraction for n, s in config.sites.items()}
    file = checkpoint / "model.safetensors"
    assert inspection.file_bytes == file.stat().st_size
    assert inspection.tensors == len(load_file(file))
    assert (inspection.clip, inspection.tune) == (config.result["clip"], {})
    assert inspection.quantized_share == config.result["quantized_share"]
    assert inspection.calibration.items() <= config.calibration.items()
    assert inspection.to_dict()["fp8_share"]["by_layer"] == shares.by_layer


def test_experts_are_one_kind(tmp_path: Path) -> None:
    tokens = torch.randint(128, (4, 24), generator=torch.Generator().manual_seed(1))
    fgmp.save(fgmp.quantize(make_model("mixtral"), tokens, Recipe(clip="off")), tmp_path / "out")
    kinds = inspect_checkpoint(tmp_path / "out").fp8_share.by_kind
    assert {k for k in kinds if "expert" in k} == {
        "mlp.experts.*.gate_up_proj",
        "mlp.experts.*.down_proj",
    }


def test_names_outside_of_lists_are_their_own_kind(tmp_path: Path) -> None:
    """A linear that no numbered list holds has no layer but itself."""
    facts = [
        LinearFacts("model.layers.0.mlp.up", 16, 16, 16, 4, 128, 128),
        LinearFacts("model.layers.1.mlp.up", 16, 16, 16, 12, 128, 128),
        LinearFacts("model.layers.1.moe.experts.3.down", 16, 16, 16, 0, 128, 128),
        LinearFacts("model.layers.1.moe.experts.4.down", 16, 16, 16, 16, 128, 128),
        LinearFacts("head", 16, 16, 16, 8, 128, 128),
    ]
    assert _shares(facts, "index") == {"0": 0.25, "1": 28 / 48, "head": 0.5}
    assert _shares(facts, "kind") == {"mlp.up": 0.5, "moe.experts.*.down": 0.5, "head": 0.5}


def test_a_digest_is_no_part_of_it(checkpoint: Path, tmp_path: Path) -> None:
    """Hashes of the calibration text, megabytes of them, say nothing to a reader."""
    model = fgmp.load(checkpoint)
    model.fgmp_config = replace(
        config_of(model), calibration={"sequences": 4, "digest": "deadbeef" * 100}
    )
    fgmp.save(model, tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out").calibration == {"sequences": 4}


# Integrity: a saboteur changes one byte anywhere in a checkpoint folder, and the file is named.
# A sample of the bytes of the small files, of the safetensors header and of the tensors is tried in
# turn with one bit flipped; CRC-32 catches every single-bit error by construction. The list of the
# other files' checksums and that list's own are tried byte by byte: what is changed there must not
# be blamed on them. How long quantizing took is no part of the result and has no checksum.

TRIALS_PER_FILE = 150


def test_every_changed_byte_is_named(checkpoint: Path, tmp_path: Path) -> None:
    inspect_checkpoint(checkpoint)
    rng = random.Random(0)
    for path in sorted(set(checkpoint.iterdir()) - {checkpoint / RUN}):
        original = path.read_bytes()
        header = 8 + int.from_bytes(original[:8], "little")
        limit = header if path.suffix == ".safetensors" else len(original)
        places = rng.sample(range(limit), min(limit, TRIALS_PER_FILE))
        places += rng.sample(range(len(original)), 20)
        for key, end in ((FILE_CHECKSUMS, b"}"), (LIST_CHECKSUM, b",")):
            at = original.find(key.encode())
            if at >= 0:
                places += range(at, original.index(end, at))
        broken = tmp_path / "broken"
        shutil.copytree(checkpoint, broken, dirs_exist_ok=True)
        for place in places:
            changed = bytearray(original)
            changed[place] ^= 1 << rng.randrange(8)
            (broken / path.name).write_bytes(changed)
            with pytest.raises(FGMPError) as caught:
                inspect_checkpoint(broken)
            assert path.name in str(caught.value), place
        shutil.copy(path, broken / path.name)
