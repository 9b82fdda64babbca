"""Errors that are the user's to mend: what is wrong, where, and what to do, in one line."""


class UserError(Exception):
    """Bad input. The command line prints it as one line and exits with ``exit_code``."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used."""


class TrainingError(UserError, RuntimeError):
    """Training that leads nowhere. All ranks raise it alike, and rank 0 prints it."""

    exit_code = 1


class LossScaleError(TrainingError):
    """One step after the other was skipped, and the loss scale cannot become smaller.

    Attributes:
        parameters: names of those whose gradients held inf or NaN in the last step, in the module's order.
    """

    def __init__(self, message: str, parameters: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.parameters = parameters


class BackendError(UserError, RuntimeError):
    """A backend that was asked for by name, and is not to be had."""


class BuildError(RuntimeError):
    """The kernels could not be compiled. ``passing`` if trying again may help (full disk, killed compiler)."""

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class PeerTimeout(RuntimeError):  # noqa: N818 - it is what users type
    """A collective that could not end: some ranks died, left, or were silent at the timeout.

    Attributes:
        ranks: who was missing, as the group (of the communicator) numbers its ranks.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks
