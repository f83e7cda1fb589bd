"""What runs a model: a pre-imported parent (`forkserver`), its child per instance (`host`), the engines they can load.

Started by dotted name, never imported by the worker, so that nothing here decides what a worker must have installed.
"""
