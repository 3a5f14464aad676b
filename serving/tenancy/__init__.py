"""Tenants' shares: quotas, places in bounded lines, turns."""
