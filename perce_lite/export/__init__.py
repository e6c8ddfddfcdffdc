"""An adapter for the programs that run it."""
