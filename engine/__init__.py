"""Engine: tokens to logits on one device. Knows no RPC, no event loop and no store."""
