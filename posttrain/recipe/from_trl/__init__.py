"""From a TRL GRPO configuration to a recipe: `posttrain init --from-trl`."""
