"""Bytes, names and JSON on disk; knows no network."""
