"""Which instance takes a request, and why; which names are near an unknown one. Pure functions."""
