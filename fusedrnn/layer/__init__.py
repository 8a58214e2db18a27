"""One call of a layer, all directions: the value, the ops, what differentiates them, and what is laid in or drawn before."""
