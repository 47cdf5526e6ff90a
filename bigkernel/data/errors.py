"""The one exception for data that cannot be used."""


class DataError(ValueError):
    """The user's data cannot be used; the message says what, where and how to fix it."""
