"""Gradients: read, checked, zeroed, clipped, and computed only where the model learns."""
