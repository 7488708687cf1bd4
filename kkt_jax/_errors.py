"""What is raised for what a user gave."""


class InputError(ValueError):
  """Something that was given cannot be used; the message names it, what it is and what is needed."""
