"""What every experiment needs and that knows nothing of any: flags, the working directory, progress, processes."""
