"""Versions that a figure was measured with, for the JSON that holds it."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Git revision of the code (``+`` if the tree differs), Python, torch and its threads."""
    root = Path(__file__).parent

    def git(*command: str) -> str:
        completed = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, check=False
        )
        return completed.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../src", ".")
    revision = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return {
        "revision": revision + "+" * bool(changed),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
