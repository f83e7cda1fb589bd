"""The data plane: client connections, choice of an instance, bytes passed through. A process of its own."""
