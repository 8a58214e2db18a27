"""The way of a plain batch, past the checks of torch.nn; what inference keeps from call to call; one step at a time."""
