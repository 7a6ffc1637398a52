"""What vLLM's entry point ``vllm.general_plugins`` calls, in every process and perhaps repeatedly.

vLLM logs a plugin that fails and goes on without it. So where this vLLM lacks something that the
plugin needs, a configuration is registered that refuses fgmp checkpoints, and nothing else.
"""

from typing import Any

from fgmp.errors import InputError
from fgmp.pack.checkpoint import QUANT_METHOD


def register() -> None:
    """Register the quantization method ``fgmp`` with vLLM."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    register_quantization_config(QUANT_METHOD)(_config_class())


def _config_class() -> type[Any]:
    try:
        from fgmp.serving.methods import FgmpConfig
    except (ImportError, AttributeError) as error:
        return _refusing(str(error))
    return FgmpConfig


def _refusing(reason: str) -> type[Any]:
    """Configuration class that refuses every checkpoint."""
    import vllm
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    version = getattr(vllm, "__version__", "unknown")

    class Refusing(QuantizationConfig):  # type: ignore[misc]
        """Refuses checkpoints of fgmp: vLLM lacks an interface that they need."""

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise InputError(
                f"fgmp checkpoints are not served by vLLM {version}, whose plugin interface "
                f"differs from that of 0.32: {reason}"
            )

        def get_name(self) -> str:
            return QUANT_METHOD

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            return None

    return Refusing
