"""Pytest fixtures; placeholder until they are written."""
