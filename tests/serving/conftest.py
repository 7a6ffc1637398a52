"""Tests that run vLLM need its environment, so they run only where `-m vllm` asks for them."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "vllm" in config.option.markexpr:
        return
    of_vllm = [item for item in items if item.get_closest_marker("vllm")]
    if of_vllm:
        config.hook.pytest_deselected(items=of_vllm)
        items[:] = [item for item in items if item not in of_vllm]
