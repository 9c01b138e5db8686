"""The one kind of error that the command line shows without a traceback."""


class UserError(ValueError):
    """Something that the person who started the command can mend; the message says how."""
