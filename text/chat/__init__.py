"""Messages of a chat to a prompt's text, cut where it may be; and what an answer says: text, reasoning, tool calls."""
