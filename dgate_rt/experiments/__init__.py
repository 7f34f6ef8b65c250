"""The experiments of the paper, each a command: ``dgate experiment NAME``."""
