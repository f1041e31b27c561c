"""The vocabulary every other layer speaks; imports nothing of ours."""
