"""The two training stages and the parts they share."""
