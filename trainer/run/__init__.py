"""What goes on around a training: states, logs, pictures, verdicts."""
