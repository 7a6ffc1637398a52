"""Every error that fgmp raises on purpose.

    FGMPError
    ├── InputError          what the user gave cannot be used: a value, a file, a model
    │   └── MemoryLimitError    the run would need more memory than there is
    └── CheckpointError     a checkpoint breaks a rule of docs/format.md

A message states the constraint, the value that breaks it and where it was found.
"""


class FGMPError(Exception):
    """Base of all errors raised on purpose; catching it catches nothing else."""


class InputError(FGMPError, ValueError):
    """An argument, file or model that the user gave cannot be used."""


class MemoryLimitError(InputError):
    """The run was refused before it began: it would not fit in memory."""


class CheckpointError(FGMPError):
    """A checkpoint is unreadable or breaks a rule of ``docs/format.md``.

    The message names the file, the tensor, the rule and the value.
    """
