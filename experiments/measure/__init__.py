"""Generated samples against the data, beside the controls without which no metric means anything."""
