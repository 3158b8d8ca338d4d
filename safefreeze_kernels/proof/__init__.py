"""The proof that frozen weights did not move: in memory, and between checkpoints on disk."""
