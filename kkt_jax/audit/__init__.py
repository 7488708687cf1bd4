"""What a classifier's weights reveal of its training data: a verdict in plain words, with its evidence."""
