"""Programs: flags, folders of runs, progress."""
