"""The method: loss, reference log-probs, trainer."""
