"""Registration with vLLM, on a stand-in that has the registry and nothing else.

``test_vllm.py`` runs the plugin in vLLM.
"""

import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fgmp.errors import InputError
from fgmp.serving import plugin


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Configuration classes by method; the stand-in lacks the layers that the plugin imports."""
    registered: dict[str, Any] = {}

    def register(name: str) -> Callable[[Any], None]:
        return lambda cls: registered.update({name: cls})

    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm"].__version__ = "9.9"  # type: ignore[attr-defined]
    quantization = ModuleType("vllm.model_executor.layers.quantization")
    quantization.register_quantization_config = register  # type: ignore[attr-defined]
    base = ModuleType(f"{quantization.__name__}.base_config")
    base.QuantizationConfig = object  # type: ignore[attr-defined]
    for module in (quantization, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "fgmp.serving.methods", raising=False)
    return registered


def test_another_interface_refuses_our_checkpoints_only(registry: dict[str, Any]) -> None:
    plugin.register()  # vLLM must start, since it may serve another model
    plugin.register()
    assert list(registry) == ["fgmp"]
    with pytest.raises(InputError, match=r"not served by vLLM 9\.9, whose plugin inter"):
        registry["fgmp"].from_config({})


def test_vllm_can_discover_it() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    entry = EntryPoint(*project["entry-points"]["vllm.general_plugins"].popitem(), "")
    assert entry.load() is plugin.register
