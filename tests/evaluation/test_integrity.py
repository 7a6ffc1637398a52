"""A saboteur changes one byte anywhere in a checkpoint folder, and ``inspect`` names the file.

A sample of the bytes of the small files, of the safetensors header and of the tensors is tried in
turn with one bit flipped; CRC-32 catches every single-bit error by construction. The list of the
other files' checksums and that list's own are tried byte by byte: what is changed there must not
be blamed on them.
"""

import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model

import fgmp
from fgmp.errors import FGMPError
from fgmp.evaluation.inspect import inspect_checkpoint
from fgmp.pack.checksums import FILES as FILE_CHECKSUMS
from fgmp.pack.checksums import FILES_LIST as LIST_CHECKSUM

_TRIALS_A_FILE = 150


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integrity") / "checkpoint"
    tokens = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))
    model = fgmp.quantize(make_model("llama"), tokens, fgmp.Recipe(clip="off"))
    fgmp.save(model, folder)
    return folder


def test_every_changed_byte_is_named(checkpoint: Path, tmp_path: Path) -> None:
    assert inspect_checkpoint(checkpoint)["intact"]
    rng = random.Random(0)
    for path in sorted(checkpoint.iterdir()):
        original = path.read_bytes()
        header = 8 + int.from_bytes(original[:8], "little")
        limit = header if path.suffix == ".safetensors" else len(original)
        places = rng.sample(range(limit), min(limit, _TRIALS_A_FILE))
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
