"""The optimizers, and the guard around those of others."""
