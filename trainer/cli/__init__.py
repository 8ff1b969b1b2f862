"""What the commands do before and after the library's functions."""
