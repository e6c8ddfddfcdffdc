"""Many users over one base: who is due, what serves whom, and slots that train several at once."""
