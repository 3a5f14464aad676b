"""A borrowed model: its code, what watching it tells, and the identity that its KV is named under."""
