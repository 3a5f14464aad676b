"""OpenAI's HTTP API over the two services: a process of its own that knows ``cairn.client`` and nothing of models."""
