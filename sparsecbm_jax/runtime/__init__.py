"""What a process needs around the mathematics: files, checkpoints, memory, accelerators, signals, progress."""
