"""Messages of a chat to a prompt's text: the model's template, and where its rendering may be cut."""
