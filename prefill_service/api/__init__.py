"""The RPCs of the prefill service, their messages and checks."""
