"""Services of a process apart from the mathematics: files, checkpoints, memory, accelerators, signals, progress."""
