"""One call of a layer, all directions: the value, the ops, what differentiates them, the masks and the segments."""
