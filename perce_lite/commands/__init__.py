"""The commands that have a room of their own."""
