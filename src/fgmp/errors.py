"""Every error that fgmp raises on purpose.

    FGMPError
    ├── InputError          an argument, file or model of the user's cannot be used
    │   └── MemoryLimitError    the run would need more memory than the machine has
    └── CheckpointError     a checkpoint breaks a rule of docs/format.md

A message states the constraint, the value that violates it, and where that value is.
"""


class FGMPError(Exception):
    """Base of all errors raised on purpose; catching it catches nothing else."""


class InputError(FGMPError, ValueError):
    """An argument, file or model of the user's cannot be used."""


class MemoryLimitError(InputError):
    """The run would not fit in memory; it was refused before it began."""


class CheckpointError(FGMPError):
    """A checkpoint is unreadable or breaks a rule of ``docs/format.md``.

    The message names the file, the tensor, the rule and the value.
    """
