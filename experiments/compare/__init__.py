"""Methods against one another on the same classifiers; it only starts experiments."""
