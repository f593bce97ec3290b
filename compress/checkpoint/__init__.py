"""Checkpoints on disk: a strict reader, a deterministic writer, a journal to resume from, an atomic publish."""
