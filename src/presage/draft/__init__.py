"""One file per drafter: who guesses ahead. ``length/`` says how far."""
