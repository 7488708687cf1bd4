"""Methods against one another on the same classifiers, and a search for settings; they only start experiments."""
