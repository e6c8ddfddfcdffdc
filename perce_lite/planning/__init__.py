"""Whether a run fits a GPU's memory."""
