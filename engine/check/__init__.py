"""The check at start: is what we compute what the model's own eager attention computes?"""
