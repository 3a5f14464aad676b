"""Where two ways of answering one request part."""
