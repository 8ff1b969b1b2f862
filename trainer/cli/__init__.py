"""The command line: thin functions over the other rooms, which are imported when a command runs."""
