"""Environments: the embedded desktop, and adapters for gymnasium, OSWorld and MiniWoB++."""
