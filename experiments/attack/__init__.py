"""Trains the classifiers that are attacked, and the generators that attack them; never looks at data by itself."""
