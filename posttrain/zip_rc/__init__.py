"""ZIP-RC: reward and remaining length foreseen at every token, in logits that the vocabulary does not use."""
