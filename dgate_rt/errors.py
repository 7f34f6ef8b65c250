"""The errors that dgate_rt raises on purpose.

Bad arguments raise ``ValueError`` or ``TypeError`` with the argument's name, what was expected and what came.
The classes here are for failures a caller may want to tell apart; each is also a ``ValueError`` or ``RuntimeError``.
"""


class SplitError(ValueError):
    """A model cannot be cut as asked: an unknown name, an untraceable module, or a stage that mixes samples."""


class ProgramError(ValueError):
    """A program file is damaged, foreign, of another version, or belongs to another backbone."""


class UnreachableTargetError(ValueError):
    """No thresholds reach the wanted accuracy or cost; the message says what is reachable."""


class ExecutorError(RuntimeError):
    """The executor that was asked for cannot run here; the message says why."""
