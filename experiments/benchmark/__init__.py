"""Speed and memory: the stationarity loss, a whole training step, and how it grows with its sizes."""
