"""The co-training loss on log-probs, and fused with the LM head."""
