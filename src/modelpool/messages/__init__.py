"""Everything that crosses a process border: frozen structs, one module per pair that talks."""
