"""The frozen base, its adapter and its log-probs."""
