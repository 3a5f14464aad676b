"""The RPCs of the decode service and their messages."""
