"""Decode service: composes stored chunks, schedules, decodes, streams."""
