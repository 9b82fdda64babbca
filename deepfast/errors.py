"""Errors that are the user's to mend: what is wrong, where, and what to do, in one line."""


class UserError(Exception):
    """Bad input. The command line prints it as one line and exits with 2."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used."""


class PeerTimeout(RuntimeError):  # noqa: N818 - it is what users type
    """A collective that could not end: some ranks died, left, or were silent at the timeout.

    Attributes:
        ranks: who was missing, as the group (of the communicator) numbers its ranks.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks
