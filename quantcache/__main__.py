"""``python -m quantcache`` is the command line, where the folder of installed commands is not on the path."""

from quantcache.cli.main import app

app(prog_name="quantcache")
