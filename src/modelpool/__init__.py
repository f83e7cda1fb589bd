"""One OpenAI-compatible address in front of many models that share few accelerators."""

__version__ = "0.1.0"
