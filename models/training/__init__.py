"""The model that ships with Cairn and the code that makes it: data, tokenizer, training, accuracy."""
