"""The policy trainer and its mathematics."""
