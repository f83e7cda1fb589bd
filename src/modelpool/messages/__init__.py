"""Everything that crosses a process border: frozen structs, one module per pair that talks.

Parts of several versions talk to each other while a pool changes from one to the next. So what is there stays, and what
is new has a default; `tests/contract/test_messages.py` holds every message to what was recorded of it.
"""
