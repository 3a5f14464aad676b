"""Text to token ids and back, and an answer's text as it streams. No torch, no models."""
