"""Many users over one base."""
