"""Captioned files to shards, and shards to the samples of an update."""
