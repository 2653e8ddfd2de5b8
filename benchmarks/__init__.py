"""How fast we are, and how fast TRL is on the same work: `make bench`. run.py is where it starts."""
