"""The error for arguments that cannot be used."""


class InputError(ValueError):
  """An argument cannot be used; the message names it, what it got and what it needs."""
