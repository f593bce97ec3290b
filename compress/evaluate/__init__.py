"""What a compressed model lost: measured, never guessed."""
