"""Bridges to other libraries, one module each. None is imported before it is asked for."""
