"""What makes the documentation from measurements: tables in the pages, figures, and mkdocs' hooks."""
