"""Model families and foreign cache formats, one file or folder each; nothing here is loaded before it is imported."""
