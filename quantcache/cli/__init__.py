"""The command line: ``main`` says what the commands take, and there is a file for what each does."""
