"""From the names in a plan to the parameters of a model, whatever wraps, shards or packs them."""
