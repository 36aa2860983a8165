"""Log-probs and entropies of target tokens straight from hidden states; logits are never kept."""
