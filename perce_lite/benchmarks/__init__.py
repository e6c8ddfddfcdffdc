"""What it costs: each measurement in a process of its own, side by side."""
