"""Keeping a behaviour while a model trains: what would harm it most stands still for a few steps at a time."""
