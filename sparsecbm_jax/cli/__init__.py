"""What the commands share: configs and flags, processes, saved runs."""
