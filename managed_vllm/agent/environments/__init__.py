"""Environments: the embedded desktop, and adapters for gymnasium, OpenEnv, OSWorld and MiniWoB++."""
