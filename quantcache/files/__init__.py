"""Prompt caches as files: the format, saving, loading, and the check of a loaded prompt."""
