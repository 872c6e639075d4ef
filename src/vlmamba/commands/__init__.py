"""What the commands of `vlmamba` do; the command line in `vlmamba.cli` imports the one that is called."""
