"""The control plane: what is registered, where it runs, what to do next. One writer; decisions are in core/."""
