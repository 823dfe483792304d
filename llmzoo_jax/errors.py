"""The one kind of error that is the user's to mend. Standard library only."""


class InputError(ValueError):
    """What the user gave is wrong: a file, a record, a key, a tensor. The message names it and
    says what to do. Commands show it without a traceback and exit with 1 (``cli.run``)."""
