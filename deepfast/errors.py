"""Errors that are the user's to mend: what is wrong, where, and what to do, in one line."""


class UserError(Exception):
    """Bad input. The command line prints it as one line and exits with 2."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used."""
