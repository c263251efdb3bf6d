"""Loading, adapters, precision, attention and the step function that training and planning share."""
