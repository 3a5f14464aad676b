"""Who gets what, when: a request's state from its line to its end, and the plan of each step. No tensors, no clock."""
