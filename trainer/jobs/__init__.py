"""One stage of a run from plan to result: what it needs, its checks, its files, what it tells."""
