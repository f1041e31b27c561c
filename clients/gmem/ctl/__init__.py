"""gmemctl, the command line."""
