"""What an answer says, told apart as it streams: text, reasoning, tool calls."""
