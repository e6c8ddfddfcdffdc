"""Will it fit? Memory by part from shapes alone, cards, and what to change."""
