"""The `populace` command: `app.py` has the main group, the other files one group of commands
each."""
